"""Several processes as one program: the real command line, on this machine."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from mora_jax import sharding
from mora_jax.errors import InputError
from train import exits, flags, runs
from train.checkpoint import Checkpoints
from train.distributed import joined, several
from train.metrics import read_metrics
from train.sections import Distributed

DEVICES = 2
DEADLINE = 15.0


def launched(config: Path, processes: int, devices: int, *words: str) -> list[subprocess.Popen]:
    """The command line `mora pretrain` in so many processes of so many devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    several = ["--distributed.coordinator-address", address, "--distributed.num-processes", str(processes)]
    command = [sys.executable, "-m", "train.cli", "pretrain", str(config), *words]
    return [
        subprocess.Popen(
            [*command, *([] if processes == 1 else [*several, "--distributed.process-id", str(i)])],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]


def finished(processes: list[subprocess.Popen]) -> list[tuple[str, str]]:
    """What each printed to stdout and stderr; all must have ended well."""
    try:
        said = [process.communicate(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()  # does nothing to one that has ended
    for process, (_, err) in zip(processes, said, strict=True):
        assert process.returncode == 0, err[-3000:]
    return said


@pytest.fixture(scope="module")
def config(tiny_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of seven updates with restarts before updates 2, 4 and 6, in a folder of its own."""
    folder = tmp_path_factory.mktemp("processes")
    text = tiny_yaml.read_text().replace("steps: 22", "steps: 7").replace("data: 1}", "data: -1, fsdp: 2}")
    path = folder / "tiny.yaml"
    path.write_text(re.sub("run_dir: .*", f"run_dir: {folder / 'run'}", text))
    return path


@pytest.fixture(scope="module")
def run_of_two(config: Path) -> Path:
    """The run, by two processes of two devices: its folder."""
    (said_0, _), (said_1, told_1) = finished(launched(config, 2, DEVICES))
    folder = config.parent / "run"
    assert "validation perplexity" in said_0
    assert "validation" not in said_1  # the second keeps quiet
    assert "mora:" not in told_1
    return folder


def losses(folder: Path, name: str = "loss") -> dict[int, float]:
    return {line["step"]: line[name] for line in read_metrics(str(folder / "metrics.jsonl")) if name in line}


def test_two_processes_compute_what_one_does(config: Path, run_of_two: Path):
    folder = config.parent / "alone"
    finished(launched(config, 1, 4, "--run-dir", str(folder)))
    for name in ("loss", "grad_norm", "validation_loss", "optimizer_cleared"):
        ours, theirs = losses(run_of_two, name), losses(folder, name)
        assert ours.keys() == theirs.keys()
        np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5)
    assert len(losses(run_of_two)) == 7
    assert list(losses(run_of_two, "restart")) == [2, 4, 6]


def arrays(folder: Path, step: int, sizes: tuple[int, int, int] = (1, 1, 1)) -> list[np.ndarray]:
    config = flags.read_config(str(folder / "config.yaml"))
    with Checkpoints(str(folder / "checkpoints")) as saved:
        state, _ = runs.restore(config, saved, step, sharding.make_mesh(*sizes))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def test_what_two_processes_saved_is_the_same_on_every_mesh(run_of_two: Path):
    whole = arrays(run_of_two, 6)
    assert any(leaf.ndim == 3 and np.any(leaf) for leaf in whole)
    for sizes in [(4, 1, 1), (1, 4, 1), (1, 2, 2)]:
        for ours, theirs in zip(arrays(run_of_two, 6, sizes), whole, strict=True):
            np.testing.assert_array_equal(ours, theirs)


# What a program that restores and saves at once leaves behind is what it has restored.
RESAVE = """
import sys
from mora_jax import sharding
from train import flags, runs
from train.checkpoint import Checkpoints
from train.distributed import joined
from train.sections import Distributed

folder, out, address, processes, process, *sizes = sys.argv[1:]
distributed = Distributed(address, int(processes), int(process)) if int(processes) > 1 else Distributed()
with joined(distributed, lambda error: print(error, file=sys.stderr) or 1):
    config = flags.read_config(f"{folder}/config.yaml")
    mesh = sharding.make_mesh(*map(int, sizes))
    with Checkpoints(f"{folder}/checkpoints") as saved, Checkpoints(out) as again:
        state, _ = runs.restore(config, saved, 6, mesh)
        again.save(6, state, saved.read_meta(6))
"""


@pytest.mark.parametrize(("processes", "sizes"), [(1, "2 2 1"), (2, "1 2 2"), (4, "2 4 1")], ids=str)
def test_any_number_of_processes_restores_every_bit(run_of_two: Path, tmp_path: Path, processes, sizes):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    devices = np.prod([int(size) for size in sizes.split()]) // processes
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    words = [str(run_of_two), str(tmp_path / "checkpoints"), address, str(processes)]
    command = [sys.executable, "-c", RESAVE, *words]
    finished(
        [
            subprocess.Popen(
                [*command, str(i), *sizes.split()], env=environment, stderr=subprocess.PIPE, text=True
            )
            for i in range(processes)
        ]
    )
    shutil.copy(run_of_two / "config.yaml", tmp_path)
    for ours, theirs in zip(arrays(tmp_path, 6), arrays(run_of_two, 6), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_ends_the_others_and_the_run_goes_on(config: Path, run_of_two: Path, victim):
    folder = config.parent / f"killed_{victim}"
    words = ("--run-dir", str(folder), "--steps", "100000", "--eval.every", "0")
    processes = launched(config, 2, DEVICES, *words)
    first_save = folder / "checkpoints" / "3" / "manifest.json"
    while not first_save.exists():
        assert all(process.poll() is None for process in processes), processes[0].communicate()
        time.sleep(0.1)
    processes[victim].kill()
    began = time.monotonic()
    _, told = processes[1 - victim].communicate(timeout=60)
    assert time.monotonic() - began < DEADLINE
    assert processes[1 - victim].returncode == exits.LOST
    last = told.strip().splitlines()[-1]
    assert last.startswith("mora: another process of this run is gone")
    processes[victim].communicate()
    # The same config on one process, and another mesh; only the number of steps is as it was.
    if victim == 0:
        return
    processes = launched(config, 1, DEVICES, *words, "--mesh.fsdp", "1", "--mesh.tensor", "2")
    while len(losses(folder)) < 4 or max(losses(folder)) < 8:
        assert processes[0].poll() is None, processes[0].communicate()
        time.sleep(0.1)
    processes[0].send_signal(signal.SIGTERM)
    _, told = processes[0].communicate(timeout=60)
    assert processes[0].returncode == exits.PREEMPTED
    assert "going on after" in told
    np.testing.assert_allclose(
        [losses(folder)[s] for s in range(3)], [losses(run_of_two)[s] for s in range(3)], rtol=0.1
    )


SLURM = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "a", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}, False),  # a batch script itself, no task of srun
        (SLURM | {"SLURM_NTASKS": "1"}, False),
        (SLURM | {"SLURM_NTASKS": "2"}, True),
        ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://a:1", "OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://a:1", "OMPI_COMM_WORLD_SIZE": "8"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, False),
    ],
    ids=str,
)  # fmt: skip
def test_what_the_environment_says(environment, expected):
    assert several(Distributed(), environment) == expected
    assert several(Distributed("host:1234", 2, 1), environment)
    assert not several(Distributed("host:1234", 1, 0), environment)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_processes": 2}, "needs distributed.coordinator_address"),
        ({"coordinator_address": "host"}, "is host:port, not 'host'"),
        ({"coordinator_address": "host:1", "num_processes": 2, "process_id": 2}, "process_id 2 must lie in"),
        ({"heartbeat_timeout": 0}, "heartbeat_timeout must be at least 1"),
    ],
    ids=str,
)
def test_processes_that_cannot_be(fields, message):
    with pytest.raises(InputError, match=re.escape(message)):
        Distributed(**fields)


def test_one_process_joins_nobody_and_its_errors_go_on():
    with pytest.raises(KeyError), joined(Distributed(), lambda error: 1):
        raise KeyError
