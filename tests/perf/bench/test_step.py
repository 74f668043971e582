"""The order of a benchmark's work and what it writes, and one run with real processes."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mora_jax.errors import InputError
from mora_jax.methods import LoRA, Method, MoRA, Rotate, to_json
from train.cli import main as cli
from train.config.sections import Mesh
from train.perf.bench import children, measure, options, record, step
from train.perf.bench.cases import SIZES, Case
from train.perf.bench.jobs import CheckJob, MatmulJob, PeerJob, StepJob, check_job, peer_job, step_job

RATE = {"device": "toy", "platform": "cpu", "matmul_side": 8, "matmul_tflops": 2.0, "versions": {"jax": "1"}}
CHECKED = {"worst": {"merged float32": 1e-6}, "failures": [], "compared": 4}


def figures(milliseconds: float) -> dict[str, Any]:
    times = {"milliseconds": milliseconds, "p10": milliseconds, "p90": milliseconds, "steps": 2}
    counts = {
        "needed_tflop": 0.001,
        "needed_tflop_base": 0.0005,
        "tokens_per_second": 128 / milliseconds * 1e3,
    }
    return {**times, **counts, "compile_seconds": 1.0, "peak_gib": 3.0, "planned_gib": 2.0, "loss": 5.0}


class World:
    """Replaces the processes: answers each job and records it."""

    def __init__(self) -> None:
        self.jobs: list[Any] = []
        self.rate, self.checked, self.failing = RATE, CHECKED, set[str]()

    def call(self, module: str, job: Any, seconds: float, environment: Any = None) -> dict[str, Any]:
        self.jobs.append(job)
        if isinstance(job, MatmulJob):
            return dict(self.rate)
        if isinstance(job, CheckJob):
            return dict(self.checked)
        if word(job) in self.failing:
            return {"error": "out of memory"}
        return figures({"full": 12.0, "frozen": 8.0, "mora": 10.0}.get(word(job), 11.0))

    def methods(self) -> list[str]:
        return [word(job) for job in self.jobs if isinstance(job, StepJob | PeerJob)]


def word(job: StepJob | PeerJob) -> str:
    """Returns the word of which the tiny case made a job."""
    if isinstance(job, PeerJob):
        return job.method
    adapters = [choice for _, choice in job.rules if isinstance(choice, Method)]
    if not adapters:
        return "full" if job.rules == ((".*", "train"),) else "frozen"
    plain, path = to_json(adapters[0]), job.spec.compute.adapter_path
    operator = plain.get("operator", {}).get("name", "share")
    words = plain["name"] + (f"-{operator}" if operator != "share" else "")
    words += f":{plain['rank']}" if plain["rank"] != 8 else ""
    return words + (f"/{path}" if path != "auto" else "")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World()
    monkeypatch.setattr(children, "call", made.call)
    return made


@pytest.fixture
def bench(tmp_path: Path) -> Callable[..., record.Record]:
    def run(case: Case | None = None, **changes: Any) -> record.Record:
        case = case or SIZES["tiny"]()
        asked = options.BenchStep("tiny", case.config, out=str(tmp_path / "figures.json"), **changes)
        return step.bench(case, asked, children.call)

    return run


def test_all_methods_are_checked_measured_and_written(world: World, bench, tmp_path: Path, capsys):
    bench()
    assert [type(job) for job in world.jobs[:2]] == [MatmulJob, CheckJob]
    assert world.methods() == [*SIZES["tiny"]().methods, "frozen"]  # again at the end, for the drift
    written = json.loads((tmp_path / "figures.json").read_text())
    assert [row["what"]["name"] for row in written["rows"]] == [
        "full",
        "frozen",
        "lora",
        "lora",
        "mora",
        "mora",
    ]
    assert written["runs"][0]["frozen_milliseconds"] == [8.0, 8.0]
    assert written["runs"][0]["check"] == CHECKED["worst"]
    shown = capsys.readouterr().out
    assert "MoRA r 8 minus the frozen base" in shown
    assert "LoRA r 8 (merged path)" in shown


@pytest.mark.parametrize(("after", "warned"), [(8.2, False), (8.3, True), (7.7, True)])
def test_a_device_that_became_faster_or_slower_is_reported(
    world: World, bench, monkeypatch: pytest.MonkeyPatch, capsys, after, warned
):
    milliseconds = iter((8.0, after))
    answers = {MatmulJob: lambda: dict(RATE), StepJob: lambda: figures(next(milliseconds))}
    monkeypatch.setattr(children, "call", lambda module, job, *others: answers[type(job)]())
    bench(methods=("frozen",), no_check=True)
    assert ("do not compare these rows" in capsys.readouterr().out) == warned


def test_wrong_results_are_not_timed(world: World, bench):
    world.checked = CHECKED | {"failures": ["mora on q/k/v is off by 1.0", "another"]}
    with pytest.raises(InputError, match=r"nothing is timed: mora on q/k/v is off by 1.0 \(and 1 more\)"):
        bench()
    assert world.methods() == []


def test_the_check_can_be_skipped(world: World, bench):
    bench(no_check=True, methods=("mora",))
    assert not any(isinstance(job, CheckJob) for job in world.jobs)


def test_a_row_that_fails_is_reported_and_the_others_are_measured(
    world: World, bench, tmp_path: Path, capsys
):
    world.failing = {"full"}
    found = bench(methods=("full", "mora"))
    assert found.rows[0]["error"] == "out of memory"
    assert found.rows[1]["milliseconds"] == 10.0
    assert "failed: out of memory" in capsys.readouterr().out
    world.failing = set()
    assert "error" not in bench(methods=("full",)).rows[0]


def test_missing_measures_only_what_the_file_lacks(world: World, bench):
    world.failing = {"lora/merged"}
    bench(methods=("mora", "lora/merged"))
    world.jobs.clear()
    found = bench(methods=("mora,lora/merged", "full"), missing=True)
    assert world.methods() == ["lora/merged", "full"]
    assert [row["run"] for row in found.rows] == [0, 1, 1]
    world.jobs.clear()
    assert len(bench(methods=("mora", "full"), missing=True).runs) == 2
    assert world.jobs == []


def test_no_row_starts_that_would_end_too_late(world: World, bench, monkeypatch: pytest.MonkeyPatch, capsys):
    clock = iter(range(0, 10_000, 40))  # each reading of the clock is 40 s later
    monkeypatch.setattr(step.time, "monotonic", lambda: next(clock))
    bench(minutes=4)
    assert world.methods() == ["full", "frozen", "lora/activation"]
    assert "4 minutes are over: LoRA r 8 (merged path)" in capsys.readouterr().out


def test_figures_of_another_setting_or_device_are_refused(world: World, bench):
    bench(methods=("mora",))
    case = SIZES["tiny"]()
    other = dataclasses.replace(case, config=dataclasses.replace(case.config, batch_size=8))
    with pytest.raises(InputError, match=r"another setting \(batch_size\)"):
        bench(other, methods=("mora",))
    world.rate = RATE | {"device": "another toy"}
    with pytest.raises(InputError, match=r"of another device \(toy\), not another toy"):
        bench(methods=("mora",))


def test_a_device_that_cannot_be_used_is_reported(world: World, bench):
    world.rate = {"error": "no device"}
    with pytest.raises(InputError, match="the device cannot be used: no device"):
        bench()


def test_cudnn_without_a_gpu_is_refused_before_anything_is_measured(world: World, bench):
    case = SIZES["250m"]()
    with pytest.raises(InputError, match="cudnn needs an NVIDIA GPU"):
        bench(case)
    assert world.methods() == []


def test_peers_come_after_the_methods(world: World, bench, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(step.importlib.util, "find_spec", lambda name: True)
    found = bench(methods=("mora",), peers=("lora:4/compiled,mora", "full/compiled-bf16"))
    peers = [job for job in world.jobs if isinstance(job, PeerJob)]
    assert [(j.method, j.rank, j.compiled, j.pure) for j in peers] == [
        ("lora", 4, True, False),
        ("mora", 8, False, False),
        ("full", 8, True, True),
    ]
    assert record.label(found.rows[-1]["what"]) == "PyTorch full fine-tuning, compiled, all bf16"
    assert "MoRA r 8 / PyTorch MoRA, tokens/s" in capsys.readouterr().out


def test_peers_that_are_not_installed_are_skipped_with_a_message(
    world: World, bench, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setattr(step.importlib.util, "find_spec", lambda name: None if name == "peft" else True)
    bench(methods=("mora",), peers=("all",))
    assert world.methods() == ["mora"]
    assert "no peers: peft not installed" in capsys.readouterr().out


@pytest.mark.parametrize("word", ["nix", "lora/fast", "lora:", "full/compiled/bf16"])
def test_bad_words_for_peers_are_refused(word: str):
    with pytest.raises(InputError, match="is not a peer"):
        peer_job(SIZES["tiny"](), word, 1, 2)


@pytest.mark.slow
def test_the_real_processes_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "figures.json"
    cli.main(
        [
            "bench",
            "step",
            "tiny",
            "--methods",
            "mora/merged",
            "--no-check",
            "--timed-steps",
            "3",
            "--out",
            str(out),
        ]
    )
    found = record.load(str(out))
    row = found.rows[0]
    assert row["what"] == {
        "framework": "jax",
        "name": "mora",
        "rank": 8,
        "path": "merged",
        "operator": "share",
    }
    assert row["steps"] == 3
    assert row["p10"] <= row["milliseconds"] <= row["p90"]
    assert row["tokens_per_second"] == pytest.approx(4 * 32 / row["milliseconds"] * 1e3)
    assert row["planned_gib"] > 0
    assert 0 < row["needed_tflop_base"] < row["needed_tflop"]
    assert 5 < row["loss"] < 7  # the logarithm of 384 is 5.95
    assert "MoRA r 8 (merged path)" in capsys.readouterr().out


def test_a_job_holds_methods_not_words():
    case = SIZES["tiny"]()
    job = step_job(case, "mora-rotate:4/merged", 1, 2)
    assert [choice for _, choice in job.rules] == [MoRA(4, Rotate(), align=8), "train", "frozen"]
    assert (job.spec.model, job.spec.compute.adapter_path) == (case.config.model, "merged")
    assert (job.batch, job.spec.base_dtype, job.warmup, job.steps) == ((4, 32), "float32", 1, 2)
    check = check_job(
        case, [step_job(case, text, 1, 2) for text in ("full", "mora", "mora/merged", "lora:4")]
    )
    assert [type(method) for method in check.methods] == [MoRA, LoRA]
    assert (check.model, check.tokens) == (case.config.model, 4 * 32)


@pytest.mark.parametrize(
    "make", [lambda case: step_job(case, "mora", 1, 2), lambda case: check_job(case, [])]
)
def test_a_deterministic_case_sets_the_flags_of_xla(monkeypatch: pytest.MonkeyPatch, make):
    """They are set before JAX starts, as in a run, and the figures have another setting."""
    seen = []

    def stop(deterministic: bool) -> None:
        seen.append(deterministic)
        raise InterruptedError

    monkeypatch.setattr(measure.backend, "set_flags", stop)
    case = SIZES["tiny"]()
    deterministic = dataclasses.replace(case, config=dataclasses.replace(case.config, deterministic=True))
    with pytest.raises(InterruptedError):
        measure.run(make(deterministic))
    assert seen == [True]
    assert record.setting(case) != record.setting(deterministic)


@pytest.mark.parametrize("command", ["sweep", "scaling"])
def test_a_mesh_of_several_devices_is_refused(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", command, "tiny", "--mesh.data", "-1", "--mesh.fsdp", "4"])
    assert stop.value.code == 2
    assert "this benchmark computes on one device, not with --mesh.fsdp 4" in capsys.readouterr().err


def test_figures_of_a_mesh_are_of_another_setting():
    case = SIZES["tiny"]()
    wide = dataclasses.replace(case, config=dataclasses.replace(case.config, mesh=Mesh(1, 4)))
    assert "mesh" not in record.setting(case)
    assert record.setting(wide) == record.setting(case) | {"mesh": {"data": 1, "fsdp": 4, "tensor": 1}}
    assert step_job(wide, "mora", 1, 2).mesh == (1, 4, 1)
