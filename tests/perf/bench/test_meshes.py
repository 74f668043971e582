"""A step on a mesh of several devices beside one."""

import dataclasses
from typing import Any

import jax
import pytest

from mora_jax.errors import InputError
from train.perf.bench import measure, meshes
from train.perf.bench.cases import SIZES
from train.perf.bench.jobs import Placement, ScalingJob, StepJob, step_job
from train.perf.hlo import option


@pytest.fixture
def job() -> StepJob:
    return step_job(SIZES["tiny"](), "mora", 1, 4)


@pytest.mark.slow
def test_a_row_of_a_mesh_has_one_device_beside_it(job: StepJob):
    row = measure.run(dataclasses.replace(job, mesh=(1, 2, 1)))
    assert isinstance(row, dict)
    assert (row["devices"], row["batch"], row["one_device"]["batch"]) == (2, 4, 2)
    assert row["mesh"] == {"data": 1, "fsdp": 2, "tensor": 1}
    one = row["one_device_milliseconds"]
    assert row["speedup"] == pytest.approx(row["tokens_per_second"] / (2 * 32 / one * 1e3))
    assert row["tokens_per_second_device"] == row["tokens_per_second"] / 2
    assert set(row["sent"]) >= {"all-gather"}
    assert "timeline" not in row  # a CPU has no streams
    assert row["loss"] == pytest.approx(row["one_device"]["loss"], abs=0.5)


def test_a_batch_that_does_not_divide_is_refused(job: StepJob):
    with pytest.raises(InputError, match="a batch of 4 does not divide among 8 shards"):
        measure.run(dataclasses.replace(job, mesh=(8, 1, 1)))


@pytest.mark.slow
def test_a_row_that_fails_leaves_the_others(job: StepJob):
    placements = (
        Placement((2, 1, 1), 8, ("xla_no_such=1",)),
        Placement((16, 1, 1), 64),
        Placement((1, 1, 2), 4),
    )
    alone, flag, large, good = meshes.scaled(ScalingJob(job, placements, compilers=2))
    assert "No such compile option: 'xla_no_such'" in flag["error"]
    assert "needs 16 devices" in large["error"]
    assert alone["devices"] == 1
    assert good["speedup"] > 0


@pytest.mark.slow
def test_a_mesh_that_does_not_fit_beside_one_device_is_measured_alone(
    job: StepJob, monkeypatch: pytest.MonkeyPatch
):
    beside, seen = meshes.beside, []

    def full(step: Any, at: Any, program: Any, one: Any, before: Any) -> Any:
        seen.append(one is not None)
        if one:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return beside(step, at, program, one, before)

    monkeypatch.setattr(meshes, "beside", full)
    alone, wide = meshes.scaled(ScalingJob(job, (Placement((2, 1, 1), 8),)))
    assert seen == [True, False]
    assert wide["one_device_milliseconds"] == alone["milliseconds"]


@pytest.mark.parametrize(
    ("flag", "parsed"),
    [
        ("--xla_gpu_a=true", ("xla_gpu_a", True)),
        ("xla_gpu_a=False", ("xla_gpu_a", False)),
        ("xla_b=12", ("xla_b", "12")),
        ("xla_c=", ("xla_c", "")),
    ],
)
def test_flags_of_xla(flag: str, parsed: tuple[str, Any]):
    assert option(flag) == parsed


@pytest.mark.parametrize("flag", ["xla_gpu_a", "gpu_a=1", "none"])
def test_other_words_are_no_flags(flag: str):
    with pytest.raises(InputError, match="is not a flag of XLA"):
        option(flag)
