"""The benchmark of the data pipeline."""

import json
from pathlib import Path

import pytest

from mora_jax.errors import InputError
from train.perf.bench import data


@pytest.mark.slow
def test_figures_are_printed_and_written(
    tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(data, "READ_SECONDS", 0.2)
    out, source = tmp_path / "speed.json", str(tiny_text / "c4-train.*")
    speed = data.bench(source, str(tiny_text / "t.model"), 32, 16, str(out), workers=1)
    written = json.loads(out.read_text())
    assert written["read_tokens_per_second"] == speed.read_tokens_per_second > 0
    assert written["prepared_tokens_per_second"] == pytest.approx(
        speed.prepared_tokens / speed.prepare_seconds
    )
    shown = capsys.readouterr().out
    assert f"{speed.prepared_tokens:,} tokens" in shown
    assert f"{speed.read_tokens_per_second / 1e6:.2f}" in shown


def test_a_missing_source_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="matches no file"):
        data.bench(str(tmp_path / "b*.jsonl"), str(tmp_path / "t.model"), 32, 16)
