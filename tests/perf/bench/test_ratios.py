"""Comparisons and tables from figures."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from mora_jax.errors import InputError
from train.perf.bench import report
from train.perf.bench.cases import SIZES
from train.perf.bench.jobs import peer_job
from train.perf.bench.ratios import Ratio, ratios
from train.perf.bench.record import Record, load, method_row, peer_row, setting


def figures(milliseconds: float, gib: float = 10.0, **more: Any) -> dict[str, Any]:
    times = {"milliseconds": milliseconds, "p10": milliseconds - 1, "p90": milliseconds + 1, "steps": 20}
    return times | {"tokens_per_second": 1e6, "compile_seconds": 9.0, "peak_gib": gib} | more


def made(size: str, methods: dict[str, tuple[float, float]], peers: dict[str, tuple[float, float]]) -> Record:
    case = SIZES[size]()
    found = Record(size, setting(case), "H")
    found.runs.append({"matmul_tflops": 800.0, "matmul_side": 8192, "versions": {"jax": "0.11"}})
    counts = {"needed_tflop": 36.0, "needed_tflop_base": 32.0}
    for word, (milliseconds, gib) in methods.items():
        found.put(method_row(case, word), figures(milliseconds, gib, **counts))
    for word, (milliseconds, gib) in peers.items():
        found.put(peer_row(peer_job(case, word, 1, 2)), figures(milliseconds, gib))
    return found


@pytest.fixture
def measured() -> Record:
    methods = {
        "full": (110.0, 30.0),
        "frozen": (88.0, 20.0),
        "lora/activation": (120.0, 25.0),
        "lora/merged": (104.0, 26.0),
        "mora": (100.0, 24.0),
        "lora:8/merged": (90.0, 20.0),
        "mora-rotate:8": (96.0, 21.0),
    }
    peers = {
        "lora": (340.0, 40.0),
        "lora/compiled": (165.0, 30.0),
        "lora/compiled-bf16": (150.0, 28.0),
        "mora": (520.0, 50.0),
    }
    return made("250m", methods, peers)


def by_name(found: Record) -> dict[str, Ratio]:
    return {ratio.name: ratio for ratio in ratios(found)}


def test_mora_is_compared_with_every_other_row(measured: Record):
    found = by_name(measured)
    values = {name: ratio.value for name, ratio in found.items() if name.startswith("MoRA r 128")}
    assert values == pytest.approx(
        {
            "MoRA r 128 minus the frozen base": 12.0,
            "MoRA r 128 / LoRA's best path, time": 100 / 104,
            "MoRA r 128 / LoRA, peak memory": 24 / 26,  # of the faster path
            "MoRA r 128 / full fine-tuning, time": 100 / 110,
            "MoRA r 128 / PyTorch LoRA, tokens/s": 3.4,
            "MoRA r 128 / PyTorch LoRA, compiled, tokens/s": 1.5,  # the faster precision
            "MoRA r 128 / PyTorch MoRA, tokens/s": 5.2,
            "MoRA r 128, share of the matmul rate": 36 / 0.1 / 800,
            "MoRA r 128, share counting the base alone": 32 / 0.1 / 800,
        }
    )


def test_aims_are_met_or_missed(measured: Record):
    met = {name: ratio.met for name, ratio in by_name(measured).items()}
    assert met["MoRA r 128 minus the frozen base"] is True
    assert met["MoRA r 128 / full fine-tuning, time"] is False
    assert met["MoRA r 128 / PyTorch LoRA, compiled, tokens/s"] is False
    assert met["MoRA r 128 / PyTorch MoRA, tokens/s"] is True
    assert met["MoRA r 128 / PyTorch LoRA, tokens/s"] is None
    assert met["MoRA rotate r 8 / LoRA's best path, time"] is False  # 1.067 over 1.05
    assert met["MoRA r 128, share counting the base alone"] is False


def test_table_5_compares_steps_and_memory_with_peft_of_the_same_rank():
    rows = {"lora:8": (100.0, 14.0), "mora-rotate:8": (90.0, 13.9), "lora:256": (110.0, 24.0)}
    found = by_name(made("7b", rows, {"lora:8": (416.0, 13.5), "lora:256": (385.0, 22.4)}))
    assert found["MoRA rotate r 8 / LoRA's best path, time"].aim == 1.05
    assert found["MoRA rotate r 8 / PEFT LoRA, steps/s"].value == pytest.approx(416 / 90)
    assert found["MoRA rotate r 8 / PEFT LoRA, peak memory"].met is True
    assert not any("PyTorch" in name for name in found)  # the same comparison would be there twice
    assert found["LoRA r 256 / PEFT LoRA, steps/s"].met is False
    assert found["LoRA r 256 / PEFT LoRA, peak memory"].met is False


def test_rows_that_failed_are_not_compared(measured: Record):
    measured.put(method_row(SIZES["250m"](), "full"), {"error": "out of memory"})
    assert not any("full" in name for name in by_name(measured))
    assert "| full fine-tuning | failed: out of memory |" in report.markdown(measured)


def test_a_share_uses_the_matmul_rate_of_its_own_run(measured: Record):
    measured.runs.append({"matmul_tflops": 400.0, "matmul_side": 8192, "versions": {}})
    measured.put(
        method_row(SIZES["250m"](), "mora"), figures(100.0, needed_tflop=36.0, needed_tflop_base=32.0)
    )
    assert by_name(measured)["MoRA r 128, share of the matmul rate"].value == pytest.approx(0.9)


def test_the_tables_of_a_page_are_rewritten_from_its_files(measured: Record, tmp_path: Path):
    (tmp_path / "figures").mkdir()
    measured.save(str(tmp_path / "figures" / "250m.json"))
    assert load(str(tmp_path / "figures" / "250m.json")) == measured
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- figures: figures/250m.json -->\nold\n<!-- end -->\nafter\n")
    assert report.refresh(str(page)) == 1
    text = page.read_text()
    assert "old" not in text
    assert text.startswith(
        "before\n<!-- figures: figures/250m.json -->\n250m: batch 64 x 512, bfloat16, on H "
    )
    assert "| MoRA r 128 | 100.00 | 99.00-101.00 | 10 | 1,000,000 | 0.450 | 0.400 | 24.00 | 9.0 |" in text
    assert "| MoRA r 128 minus the frozen base | 12.00 ms | <= 13 ms | met |" in text
    assert text.endswith("<!-- end -->\nafter\n")
    assert report.refresh(str(page)) == 1
    assert page.read_text() == text


def test_missing_pages_and_bad_files_are_refused(tmp_path: Path):
    page = tmp_path / "page.md"
    with pytest.raises(InputError, match="cannot read this page"):
        report.refresh(str(page))
    page.write_text("nothing marked")
    with pytest.raises(InputError, match="holds no <!-- figures"):
        report.refresh(str(page))
    page.write_text("<!-- figures: a.json -->\n<!-- end -->\n")
    with pytest.raises(InputError, match=r"a.json: cannot read these figures"):
        report.refresh(str(page))
    (tmp_path / "a.json").write_text(json.dumps({"other": 1}))
    with pytest.raises(InputError, match="holds no figures of mora bench step"):
        report.refresh(str(page))


def test_the_tables_of_performance_md_are_those_of_its_figures():
    page = Path(__file__).parents[3] / "docs" / "performance.md"
    for match in report.MARKED.finditer(page.read_text()):
        written = report.markdown(load(str(page.parent / match[2])))
        assert match[0] == f"{match[1]}{written}{match[3]}", f"{match[2]}: run mora bench report"


def test_a_setting_is_plain_data():
    case = SIZES["250m"]()
    plain = setting(dataclasses.replace(case))
    assert json.loads(json.dumps(plain)) == plain
