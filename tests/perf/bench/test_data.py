"""The benchmark of the data pipeline."""

import json
import random
from pathlib import Path

import pytest

from mora_jax.errors import InputError
from train.data.tokenizer import train_tokenizer
from train.perf.bench import data


@pytest.fixture
def text(tmp_path: Path) -> Path:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=5)) for _ in range(200)]
    lines = (json.dumps({"text": " ".join(rng.choices(words, k=40))}) for _ in range(800))
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    train_tokenizer(str(tmp_path / "a.jsonl"), str(tmp_path / "t.model"), 400)
    return tmp_path


def test_figures_are_printed_and_written(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(data, "READ_SECONDS", 0.2)
    out = text / "speed.json"
    speed = data.bench(str(text / "a.jsonl"), str(text / "t.model"), 32, 16, str(out), workers=1)
    written = json.loads(out.read_text())
    assert written["read_tokens_per_second"] == speed.read_tokens_per_second > 0
    assert written["prepared_tokens_per_second"] == pytest.approx(
        speed.prepared_tokens / speed.prepare_seconds
    )
    shown = capsys.readouterr().out
    assert f"{speed.prepared_tokens:,} tokens" in shown
    assert f"{speed.read_tokens_per_second / 1e6:.2f}" in shown


def test_a_missing_source_is_refused(text: Path):
    with pytest.raises(InputError, match="matches no file"):
        data.bench(str(text / "b*.jsonl"), str(text / "t.model"), 32, 16)
