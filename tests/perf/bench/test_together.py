"""`mora bench step` as one of several processes."""

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mora_jax.errors import InputError
from train.config.sections import Distributed
from train.perf.bench import together
from train.perf.bench.cases import SIZES
from train.perf.bench.options import BenchStep
from train.perf.bench.record import load


def test_what_processes_would_not_understand_alike_is_refused():
    case = SIZES["tiny"]()
    config = dataclasses.replace(case.config, distributed=Distributed("127.0.0.1:1", 2))
    case = dataclasses.replace(case, config=config)
    for changes in ({"missing": True}, {"minutes": 1.0}, {"peers": ("all",)}):
        with pytest.raises(InputError, match="need a single process"):
            together.bench_step(case, BenchStep("tiny", config, **changes), lambda error: 1)


def test_a_failure_is_a_row():
    assert together.here("", None, 1.0)["error"].startswith("AttributeError: ")


@pytest.mark.slow
def test_two_processes_measure_one_mesh_and_the_first_writes(tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    words = ["--methods", "mora", "--no-check", "--timed-steps", "4", "--mesh.data", "2"]
    words += ["--distributed.coordinator-address", address, "--distributed.num-processes", "2"]
    command = [sys.executable, "-m", "train.cli", "bench", "step", "tiny", *words]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu"}
    started = [
        subprocess.Popen(
            [*command, "--distributed.process-id", str(i), "--out", str(tmp_path / f"{i}.json")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for i in range(2)
    ]
    printed = [process.communicate(timeout=300)[0].decode() for process in started]
    assert [process.returncode for process in started] == [0, 0], printed
    assert sorted(path.name for path in tmp_path.glob("*.json")) == ["0.json"]
    (row,) = load(str(tmp_path / "0.json")).rows
    assert (row["devices"], row["mesh"]["data"], row["batch"]) == (2, 2, 4)
    assert "MoRA r 8" in printed[0]
    assert "MoRA r 8" not in printed[1]
