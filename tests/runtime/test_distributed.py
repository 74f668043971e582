"""Several processes as one program: the real command line, on this machine."""

import dataclasses
import errno
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

from mora_jax import hf, sharding
from mora_jax.errors import InputError
from mora_jax.models.llama import Llama
from train.config import flags
from train.config.sections import Distributed
from train.console import exits
from train.data.rows.build import prepare
from train.data.rows.info import load_info
from train.data.rows.read import train_batches
from train.jobs.pretrain import pretrain
from train.run.checkpoint import Checkpoints
from train.run.metrics import read_metrics
from train.run.state import restore_state
from train.runtime import distributed
from train.runtime.distributed import joined, several
from train.step.spec import spec_of
from train.step.state import init_params

DEVICES = 2
DEADLINE = 15.0
_LAUNCHED: list[subprocess.Popen] = []  # by the last call of `launched`


@pytest.fixture(autouse=True)
def _none_is_left():
    """Whatever a test that fails leaves behind is ended."""
    yield
    while _LAUNCHED:
        process = _LAUNCHED.pop()
        process.kill()  # does nothing to one that has ended
        process.communicate()


def launched(
    config: Path, processes: int, devices: int, *words: str, last: tuple[str, ...] = ()
) -> list[subprocess.Popen]:
    """The command line `mora pretrain` in so many processes of so many devices, `last` for the last."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    several = ["--distributed.coordinator-address", address, "--distributed.num-processes", str(processes)]
    command = [sys.executable, "-m", "train.cli", "pretrain", str(config), *words]
    _LAUNCHED[:] = [
        subprocess.Popen(
            [
                *command,
                *([] if processes == 1 else [*several, "--distributed.process-id", str(i)]),
                *(last if i == processes - 1 else ()),
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]
    return list(_LAUNCHED)


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
    """A run of seven updates with restarts before updates 2, 4 and 6, in a folder of its own.

    What is a bad step is drawn so narrowly that some are; none is near the bound.
    """
    folder = tmp_path_factory.mktemp("processes")
    text = tiny_yaml.read_text().replace("steps: 22", "steps: 7").replace("data: 1}", "data: -1, fsdp: 2}")
    text = text.replace("{window: 1}", "{window: 1, factor: 1.02}")
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


def assert_same(ours: Path, theirs: Path) -> None:
    """Asserts that two runs logged the same updates with the same values."""
    for name in ("loss", "grad_norm", "skipped_steps", "validation_loss", "optimizer_cleared"):
        a, b = losses(ours, name), losses(theirs, name)
        assert a.keys() == b.keys()
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-5)


SHORT = ("--steps", "2", "--restart.every", "0", "--schedule.kind", "cosine", "--schedule.warmup", "1")


@pytest.mark.slow
def test_a_short_run_of_two_processes_is_that_of_one(config: Path):
    """What they compute, what they print, and what their last checkpoint holds."""
    folders = [config.parent / name for name in ("short", "short_alone")]
    (said_0, _), (said_1, told_1) = finished(
        launched(config, 2, DEVICES, "--run-dir", str(folders[0]), *SHORT)
    )
    assert "validation perplexity" in said_0
    assert "validation" not in said_1
    assert "mora:" not in told_1
    words = ["--run-dir", str(folders[1]), "--mesh.data", "2", *SHORT]
    pretrain(flags.read_config(str(config), words))
    assert_same(*folders)
    assert len(losses(folders[0])) == 2
    whole = arrays(folders[0], 2)
    for ours, theirs in zip(arrays(folders[0], 2, (1, 2, 2)), whole, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.fixture(scope="module")
def other_data(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data set of other text, made with the same tokenizer."""
    out = str(tmp_path_factory.mktemp("other") / "data")
    source, validation = (str(tiny_text / f"c4-{split}.*") for split in ("validation", "train"))
    prepare(source, validation, str(tiny_text / "t.model"), 32, out, workers=1)
    return out


@pytest.mark.slow  # test_agree.py compares what processes have
@pytest.mark.parametrize("what", ["steps", "train rows"])
def test_processes_that_were_started_differently_are_refused(config: Path, tmp_path: Path, what, other_data):
    """Another number of steps would make them wait for each other for ever."""
    last = {
        "steps": ("--steps", "3"),
        "train rows": ("--data.directory", other_data),
    }[what]
    folder = tmp_path / "run"
    processes = launched(config, 2, DEVICES, "--run-dir", str(folder), *SHORT, last=last)
    for process in processes:
        _, said = process.communicate(timeout=60)
        assert process.returncode == exits.BAD_INPUT, said
        assert f"mora: process 1 of this run has {what} " in said.splitlines()[-1]
        assert ", but process 0 has " in said.splitlines()[-1]
    assert not folder.exists()


@pytest.mark.slow
def test_two_processes_compute_what_one_does(config: Path, run_of_two: Path):
    folder = config.parent / "alone"
    finished(launched(config, 1, 4, "--run-dir", str(folder)))
    assert_same(run_of_two, folder)
    assert len(losses(run_of_two)) == 7
    assert list(losses(run_of_two, "restart")) == [2, 4, 6]
    assert list(losses(run_of_two, "skipped_steps").values()) == [0, 0, 0, 1, 2, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "devices", "mesh"),
    [(1, 4, ("--mesh.data", "1", "--mesh.tensor", "2")), (4, 1, ())],
    ids=["1 on another mesh", "4"],
)
def test_a_run_resumes_with_more_and_with_fewer_processes(run_of_two: Path, config, processes, devices, mesh):
    """From the middle: between two restarts, and after a step that was skipped."""
    folder = Path(shutil.copytree(run_of_two, config.parent / f"of_{processes}"))
    for later in ("6", "7"):
        shutil.rmtree(folder / "checkpoints" / later)
    (folder / "summary.json").unlink()
    printed = finished(launched(config, processes, devices, "--run-dir", str(folder), *mesh))
    assert "resuming after 3 of 7 updates" in printed[0][1]
    assert_same(folder, run_of_two)
    assert (folder / "checkpoints/7/manifest.json").exists()


def arrays(folder: Path, step: int, sizes: tuple[int, int, int] = (1, 1, 1)) -> list[np.ndarray]:
    config = flags.read_config(str(folder / "config.yaml"))
    with Checkpoints(str(folder / "checkpoints")) as saved:
        state, _ = restore_state(config, saved, step, sharding.make_mesh(*sizes))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_is_equal_on_every_mesh(run_of_two: Path):
    whole = arrays(run_of_two, 6)
    assert any(leaf.ndim == 3 and np.any(leaf) for leaf in whole)
    for sizes in [(4, 1, 1), (1, 4, 1), (1, 2, 2)]:
        for ours, theirs in zip(arrays(run_of_two, 6, sizes), whole, strict=True):
            np.testing.assert_array_equal(ours, theirs)


# What a program that restores and saves at once leaves behind is what it has restored.
RESAVE = """
import sys
from mora_jax import sharding
from train.config import flags
from train.run.state import restore_state
from train.run.checkpoint import Checkpoints
from train.runtime.distributed import joined
from train.config.sections import Distributed
folder, out, address, processes, process, *sizes = sys.argv[1:]
distributed = Distributed(address, int(processes), int(process)) if int(processes) > 1 else Distributed()
with joined(distributed, lambda error: print(error, file=sys.stderr) or 1):
    config = flags.read_config(f"{folder}/config.yaml")
    mesh = sharding.make_mesh(*map(int, sizes))
    with Checkpoints(f"{folder}/checkpoints") as saved, Checkpoints(out) as again:
        state, _ = restore_state(config, saved, 6, mesh)
        again.save(6, state, saved.read_meta(6))
"""


@pytest.mark.slow
def test_several_processes_restore_every_bit(run_of_two: Path, tmp_path: Path):
    processes = 4
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "2",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    words = [str(run_of_two), str(tmp_path / "checkpoints"), address, str(processes)]
    command = [sys.executable, "-c", RESAVE, *words]
    finished(
        [
            subprocess.Popen(
                [*command, str(i), "2", "2", "2"], env=environment, stderr=subprocess.PIPE, text=True
            )
            for i in range(processes)
        ]
    )
    shutil.copy(run_of_two / "config.yaml", tmp_path)
    for ours, theirs in zip(arrays(tmp_path, 6), arrays(run_of_two, 6), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def wait_for(condition, processes: list[subprocess.Popen]) -> None:
    """Until a condition holds; no process may end before, and it does not take minutes."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < 120, "the processes hang"
        assert all(process.poll() is None for process in processes), processes[0].communicate()
        time.sleep(0.1)


def kill(victim: int, processes: list[subprocess.Popen]) -> None:
    """Kills one of two processes, and looks how the other one ends."""
    processes[victim].kill()
    began = time.monotonic()
    _, printed = processes[1 - victim].communicate(timeout=60)
    assert time.monotonic() - began < DEADLINE
    assert processes[1 - victim].returncode == exits.LOST, printed
    assert printed.strip().splitlines()[-1].startswith("mora: another process of this run is gone")
    processes[victim].communicate()


def ask_to_stop(asked: int, processes: list[subprocess.Popen]) -> int:
    """Sends SIGTERM to one process; after how many updates all have stopped, with a checkpoint."""
    processes[asked].send_signal(signal.SIGTERM)
    ends = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [exits.PREEMPTED] * len(processes), ends
    assert [("SIGTERM: stopping" in printed) for printed in ends] == [
        i == asked for i in range(len(processes))
    ]
    (step,) = {int(re.findall(r"stopped after (\d+) of 100000 updates", printed)[0]) for printed in ends}
    return step


ENDLESS = ("--steps", "100000", "--eval.every", "0", "--bad-steps.window", "0")


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_other_one(config: Path):
    """Both have read their parts of the model that the run began with."""
    folder, model = config.parent / "killed", config.parent / "model"
    settings = flags.read_config(str(config))
    params = init_params(spec_of(dataclasses.replace(settings, seed=5)))
    hf.save_hf(model, params, settings.model)
    words = ("--run-dir", str(folder), *ENDLESS, "--init-from", str(model))
    processes = launched(config, 2, DEVICES, *words)
    wait_for((folder / "checkpoints/3/manifest.json").exists, processes)
    kill(0, processes)
    batch = next(train_batches(load_info(settings.data.directory), 4, settings.seed, 0))
    llama, variables = Llama(settings.model, settings.compute), {"params": params}
    total, count = llama.apply(variables, batch, method=Llama.loss)
    np.testing.assert_allclose(losses(folder)[0], float(total / count), rtol=1e-5)


@pytest.mark.slow
def test_a_run_of_two_processes_resumes_whatever_ends_one_of_them(config: Path):
    """Killed, asked to stop and killed again; and then on one process, with another mesh."""
    folder = config.parent / "ended"
    words = ("--run-dir", str(folder), *ENDLESS)
    processes = launched(config, 2, DEVICES, *words)
    wait_for((folder / "checkpoints/3/manifest.json").exists, processes)
    kill(0, processes)

    processes = launched(config, 2, DEVICES, *words)
    wait_for(lambda: list(losses(folder))[-1] > 8, processes)
    stopped = ask_to_stop(1, processes)
    with Checkpoints(str(folder / "checkpoints")) as saved:
        assert saved.latest_good() == (stopped, [])
    assert list(losses(folder)) == list(range(stopped))

    processes = launched(config, 2, DEVICES, *words)
    wait_for(lambda: len(losses(folder)) > stopped, processes)
    kill(1, processes)

    processes = launched(config, 1, DEVICES, *words, "--mesh.fsdp", "1", "--mesh.tensor", "2")
    seen = len(losses(folder))
    wait_for(lambda: len(losses(folder)) > seen + 3, processes)
    assert ask_to_stop(0, processes) > seen


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
def test_several_processes_by_environment(environment, expected):
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
def test_invalid_processes_are_refused(fields, message):
    with pytest.raises(InputError, match=re.escape(message)):
        Distributed(**fields)


@pytest.mark.slow
@pytest.mark.parametrize("missing", [0, 1])
def test_processes_that_do_not_find_each_other(config: Path, missing: int):
    """JAX's runtime aborts such a process, with a page of native stack."""
    both = launched(config, 2, 1, "--distributed.initialization-timeout", "4")
    both[missing].kill()
    _, printed = both[1 - missing].communicate(timeout=60)
    assert both[1 - missing].returncode == exits.BAD_INPUT
    assert re.fullmatch(r"mora: the processes of this run do not find each other at .*\n", printed), printed


def test_an_error_of_jax_is_found_behind_others():
    lost = jax.errors.JaxRuntimeError("a task died")
    saving, restoring = OSError("could not be saved"), InputError("cannot be restored")
    saving.__cause__, restoring.__context__ = lost, saving
    assert all(map(distributed._came_from_jax, (lost, saving, restoring)))
    assert not distributed._came_from_jax(OSError("disk"))
    # As jax 0.10.2 raises it where a jitted function is called for the first time.
    assert distributed._came_from_jax(ValueError("UNKNOWN: Gloo AllGather failed: [connection.cc:1] reset"))
    assert distributed._came_from_jax(ValueError("FAILED_PRECONDITION: NCCL"))
    assert not distributed._came_from_jax(ValueError("Shapes (2,) and (3,) differ"))
    assert not distributed._came_from_jax(ValueError("JSON: not an object"))


def test_a_failure_without_a_system_reason_may_be_a_lost_process():
    """Such as a save that waited for it; a full disk is none."""
    for number, unclear in ((None, True), (errno.EIO, True), (errno.ENOSPC, False)):
        assert distributed._has_no_reason(OSError(number, "could not be saved")) == unclear
    assert not distributed._has_no_reason(ValueError("a bug"))


def test_a_single_process_joins_nobody_and_its_errors_propagate():
    with pytest.raises(KeyError), joined(Distributed(), lambda error: 1):
        raise KeyError
