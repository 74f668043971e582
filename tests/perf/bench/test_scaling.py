"""The rows of a scaling table, what becomes of those that fail, the comparisons and the picture."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mora_jax.errors import InputError
from train.cli import main as cli
from train.perf.bench import children, report, scaling, scaling_table
from train.perf.bench.cases import SIZES
from train.perf.bench.jobs import ScalingJob
from train.perf.bench.options import BenchScaling
from train.perf.bench.record import Record, load

RATE = {"device": "toy", "platform": "cpu", "devices": 4, "matmul_side": 8, "matmul_tflops": 2.0}
PNG = b"\x89PNG"


def figures(devices: int, batch: int, speedup: float | None) -> dict[str, Any]:
    found = {"milliseconds": 10.0, "p10": 9.0, "p90": 11.0, "steps": 2, "devices": devices, "batch": batch}
    found |= {"needed_tflop": 0.01, "needed_tflop_base": 0.005, "planned_gib": 1.0, "compile_seconds": 2.0}
    found |= {"tokens_per_second": 100.0 * devices, "tokens_per_second_device": 100.0}
    if speedup:
        found |= {"speedup": speedup, "sent": {"all-reduce": 3 * 2**20}}
        found |= {"timeline": {"exposed": 0.5, "communicating": 2.0}}
    return found


class World:
    """Replaces the processes: answers each job and records it."""

    def __init__(self) -> None:
        self.jobs: list[ScalingJob] = []
        self.dies_at: tuple[int, int, int] | None = None
        self.baselines_that_die: list[int] = []

    def stream(
        self, module: str, job: ScalingJob, seconds: float, environment: dict[str, str]
    ) -> Iterator[dict[str, Any]]:
        self.jobs.append(job)
        if len(self.jobs) in self.baselines_that_die and job.baseline:
            yield {"error": "timed out after 600 s"}
            return
        if job.baseline:
            yield figures(1, job.step.batch[0], None)
        for placement in job.placements:
            if placement.mesh == self.dies_at:
                yield {"error": "died with status 1: no memory"}
                return
            devices = placement.mesh[0] * placement.mesh[1] * placement.mesh[2]
            yield figures(devices, placement.batch, 0.9 * devices - 0.1 * bool(placement.flags))


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World()
    monkeypatch.setattr(children, "call", lambda *others: dict(RATE))
    monkeypatch.setattr(children, "stream", made.stream)
    return made


def run(**changes: Any) -> Record:
    case = SIZES["tiny"]()
    return scaling.bench(case, BenchScaling("tiny", case.config, **changes))


def test_a_run_notes_the_flags_of_xla(world: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_some_flag=true")
    assert run(meshes=("data:2",)).runs[-1]["xla_flags"] == "--xla_some_flag=true"


def test_the_whole_table(world: World, tmp_path: Path, capsys):
    out, picture = tmp_path / "scaling.json", tmp_path / "scaling.png"
    found = run(out=str(out), picture=str(picture))
    meshes = ["one device", "data 2", "fsdp 2", "tensor 2", "data 4", "fsdp 4", "tensor 4", "data 2 x fsdp 2"]
    assert [row["what"]["mesh"] for row in found.rows] == meshes
    # Each device keeps its sequences, but tensor divides those of one.
    assert [row["batch"] for row in found.rows] == [4, 8, 8, 4, 16, 16, 4, 16]
    assert load(str(out)) == found
    assert picture.read_bytes().startswith(PNG)
    assert "MoRA r 8, data 4, share of all devices' rate" in " ".join(capsys.readouterr().out.split())


def test_sets_of_flags_are_compared_with_none(world: World):
    found = run(meshes=("data:4",), flags=("none", "xla_gpu_a=true,xla_gpu_b=1"))
    assert [p.flags for p in world.jobs[0].placements] == [(), ("xla_gpu_a=true", "xla_gpu_b=1")]
    (share, flags) = scaling_table.ratios(found)
    assert (share.name, share.value) == ("MoRA r 8, data 4, share of all devices' rate", pytest.approx(0.9))
    assert (flags.name, flags.value) == (
        "MoRA r 8, data 4, a=true b=1 / no flag, time",
        pytest.approx(36 / 35),
    )


def test_a_process_that_dies_costs_one_row(world: World):
    world.dies_at = (1, 2, 1)
    found = run(meshes=("data:2", "fsdp:2", "tensor:2"))
    assert [row.get("error", "") for row in found.rows] == ["", "", "died with status 1: no memory", ""]
    assert [len(job.placements) for job in world.jobs] == [3, 1]
    assert "failed: died" in report.markdown(found)


def test_one_device_that_fails_the_second_time_is_left_out(world: World):
    world.dies_at, world.baselines_that_die = (1, 2, 1), [2, 3, 4]
    found = run(meshes=("data:2", "fsdp:2", "tensor:2"))
    assert [row.get("error", "") for row in found.rows] == ["", "", "died with status 1: no memory", ""]
    assert [(len(job.placements), job.baseline) for job in world.jobs] == [(3, True), (1, True), (1, False)]


def test_without_one_device_there_is_no_ratio_to_it(world: World):
    found = run(meshes=("data:2",), no_baseline=True)
    assert [row["what"]["mesh"] for row in found.rows] == ["data 2"]


def test_rows_that_would_end_too_late_are_not_measured(world: World, monkeypatch: pytest.MonkeyPatch, capsys):
    clock = iter(range(0, 10_000, 25))
    monkeypatch.setattr(scaling.time, "monotonic", lambda: next(clock))
    assert len(run(minutes=3).rows) < 8
    assert "3 minutes are over" in capsys.readouterr().out


@pytest.mark.parametrize("word", ["data", "data:1", "width:2", "data:2+", "data:0+fsdp:2"])
def test_words_that_are_no_mesh_are_refused(word: str):
    with pytest.raises(InputError, match="is no mesh of several devices"):
        scaling.parsed([word])


def test_meshes_of_several_axes():
    assert scaling.parsed(["data:2+fsdp:2,tensor:4"]) == [(2, 2, 1), (1, 1, 4)]
    assert scaling.all_meshes(3) == [(2, 1, 1), (1, 2, 1), (1, 1, 2)]
    assert scaling.all_meshes(8)[-1] == (2, 4, 1)
    with pytest.raises(InputError, match="needs several devices"):
        scaling.all_meshes(1)


def test_a_page_gets_the_table_of_meshes(world: World, tmp_path: Path):
    run(meshes=("fsdp:2",), out=str(tmp_path / "s.json"))
    page = tmp_path / "page.md"
    page.write_text("<!-- figures: s.json -->\n<!-- end -->\n")
    assert report.refresh(str(page)) == 1
    assert "| MoRA r 8 | fsdp 2 | 8 | 10.00 | 100 | 1.80 | 0.900 |" in page.read_text()
    assert "| all-reduce 3 | 0.50 of 2.00 |" in page.read_text()


@pytest.mark.slow
def test_real_processes_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out, words = tmp_path / "s.json", ["--meshes", "fsdp:2", "--timed-steps", "4", "--profiled-steps", "0"]
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("JAX_NUM_CPU_DEVICES", "2")
        cli.main(["bench", "scaling", "tiny", *words, "--out", str(out)])
    alone, wide = load(str(out)).rows
    assert (alone["batch"], wide["batch"], wide["devices"]) == (4, 8, 2)
    assert wide["sent"]["all-gather"] > 0
    assert wide["speedup"] > 0
    assert "MoRA r 8, fsdp 2" in capsys.readouterr().out
