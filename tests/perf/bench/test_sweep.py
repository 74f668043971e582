"""Sweeps around a case, and their picture."""

import dataclasses
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from mora_jax.errors import InputError
from mora_jax.methods import Method
from train.perf.bench import children, sweep, sweep_plot
from train.perf.bench.cases import SIZES
from train.perf.bench.jobs import MatmulJob
from train.perf.bench.options import BenchSweep
from train.perf.bench.record import Record, load

CASE = SIZES["250m"]()


def asked(**changes: Any) -> BenchSweep:
    return BenchSweep("250m", CASE.config, **changes)


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    done: list[Any] = []

    def call(module: str, job: Any, seconds: float) -> dict[str, Any]:
        if isinstance(job, MatmulJob):
            return {"device": "toy", "platform": "gpu", "matmul_tflops": 1.0, "matmul_side": 8}
        done.append(job)
        (rank,) = {choice.rank for _, choice in job.rules if isinstance(choice, Method)}
        milliseconds = math.prod(job.batch) * job.spec.model.hidden_size / 1e6
        return {"milliseconds": milliseconds, "peak_gib": None, "planned_gib": rank / 10}

    monkeypatch.setattr(children, "call", call)
    return done


def test_one_size_at_a_time_and_no_point_twice():
    points = list(sweep.points(CASE, asked(methods=("frozen", "mora"))))
    whats = [what for what, _ in points]
    assert all(whats.count(what) == 1 for what in whats)
    # The case itself is a point of all four axes, and the frozen base has no rank.
    assert len([w for w in whats if w["name"] == "mora"]) == 4 * 4 - 3
    assert len([w for w in whats if w["name"] == "frozen"]) == 3 * 4 - 2


@pytest.mark.parametrize(
    ("axis", "factor", "changed"),
    [
        ("batch", Fraction(1, 8), {"batch_size": 8}),
        ("sequence", Fraction(8), {"sequence_length": 4096, "max_position_embeddings": 4096}),
        ("rank", Fraction(1, 16), {"rank": 8}),
        (
            "width",
            Fraction(3, 2),
            {"hidden_size": 1152, "intermediate_size": 3840, "num_attention_heads": 24},
        ),
    ],
)
def test_sizes_are_scaled(axis: str, factor: Fraction, changed: dict[str, int]):
    config = sweep.scaled(CASE.config, axis, factor)
    values = {
        f.name: getattr(section, f.name)
        for section in (config, config.data, config.method, config.model)
        for f in dataclasses.fields(section)
    }
    assert {name: values[name] for name in changed} == changed
    assert config.model.head_width == CASE.config.model.head_width


def test_a_size_that_does_not_divide_is_refused():
    with pytest.raises(InputError, match="--batch-size 60 times 1/8 is not an integer"):
        sweep.scaled(dataclasses.replace(CASE.config, batch_size=60), "batch", Fraction(1, 8))


def test_a_sweep_resumes_from_its_file_and_draws_the_picture(jobs: list[Any], tmp_path: Path, capsys):
    out, picture = str(tmp_path / "sweep.json"), tmp_path / "images" / "sweep.png"
    sweep.bench(CASE, asked(methods=("mora",), axes=("batch",), out=out))
    assert len(jobs) == 4
    sweep.bench(CASE, asked(methods=("mora",), axes=("batch", "rank"), out=out, picture=str(picture)))
    assert len(jobs) == 4 + 3
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "MoRA r 128, batch 8 x 512, width 768: 3.15 ms, 12.80 GiB" in capsys.readouterr().out
    drawn = sweep_plot.lines(load(out), "batch")
    assert {name: xs for name, (xs, _) in drawn.items()} == {"MoRA": [8, 16, 32, 64]}
    xs, rows = sweep_plot.lines(load(out), "rank")["MoRA"]
    assert xs == [8, 32, 128, 256]
    assert [sweep_plot.memory(row) for row in rows] == [0.8, 3.2, 12.8, 25.6]


def test_a_picture_needs_two_points(tmp_path: Path):
    record = Record("250m", sweep.start(CASE, "").setting)
    with pytest.raises(InputError, match="nothing to draw"):
        sweep_plot.plot(record, str(tmp_path / "a.png"))
