"""A run whose disk is full or read-only, or whose folder another program has: it stops, and can go on."""

import dataclasses
import errno
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from mora_jax import sharding
from mora_jax.errors import InputError
from train.cli import main as cli
from train.config.sections import Checkpoint, Compilation
from train.console import exits
from train.jobs import pretrain as loop
from train.run.folder import open_checkpoints
from train.run.metrics import Metrics, read_metrics
from train.run.state import restore_state
from train.storage import lock

TIMES = ("data_wait", "tokens_per_second")


@pytest.fixture
def config(tiny_run, disk):
    """The tiny run on a small disk."""
    return dataclasses.replace(
        tiny_run.config, run_dir=str(disk.path / "run"), compilation=Compilation("off")
    )


def logged(folder: Path) -> list[dict]:
    lines = read_metrics(str(folder / "metrics.jsonl"))
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def final_arrays(config) -> list[np.ndarray]:
    with open_checkpoints(config) as saved:
        state, _ = restore_state(config, saved, config.steps, sharding.make_mesh(1))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def assert_undisturbed(config, tiny_run) -> None:
    other = dataclasses.replace(tiny_run.config, run_dir=str(tiny_run.folder))
    assert logged(Path(config.run_dir)) == logged(tiny_run.folder)
    for ours, theirs in zip(final_arrays(config), final_arrays(other), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def fill_at(monkeypatch: pytest.MonkeyPatch, disk, update: int) -> None:
    """Fills the disk up as the batch of an update is asked for."""
    real, asked = loop.next_batch, iter(range(100))

    def next_batch(*args):
        if next(asked) == update:
            disk.fill()
        return real(*args)

    monkeypatch.setattr(loop, "next_batch", next_batch)


@pytest.mark.slow  # the other tests fill the disk for less than a run
@pytest.mark.parametrize(
    ("every", "message"),
    [
        (0, r"run/metrics\.jsonl|run/tensorboard"),
        (3, "could not be saved: No space left"),
    ],
    ids=["in the metrics", "in a save"],
)
def test_a_full_disk_stops_the_run_and_it_resumes(config, tiny_run, disk, monkeypatch, every, message):
    config = dataclasses.replace(config, checkpoint=Checkpoint(every, keep=2))
    with monkeypatch.context() as patch:
        fill_at(patch, disk, 7)
        with pytest.raises(OSError, match=message) as stopped:
            loop.pretrain(config)
    assert stopped.value.errno == errno.ENOSPC
    with open_checkpoints(config) as saved:
        step, damaged = saved.latest_good()
    assert step in ((3, 6) if every else (None,))  # that of 6 may have been under way
    assert damaged == []
    with pytest.raises(OSError, match="No space left"):
        loop.pretrain(config)
    disk.free()
    loop.pretrain(config)
    assert_undisturbed(config, tiny_run)


@pytest.mark.slow
def test_a_disk_that_is_full_at_the_end(config, tiny_run, disk, monkeypatch):
    real = loop.plot_loss
    with monkeypatch.context() as patch:
        patch.setattr(loop, "plot_loss", lambda *args: (disk.fill(), real(*args)))
        with pytest.raises(OSError, match="No space left"):
            loop.pretrain(config)
    assert not (Path(config.run_dir) / loop.SUMMARY).exists()
    disk.free()
    summary = loop.pretrain(config)
    assert summary["validation_loss"] == tiny_run.summary["validation_loss"]
    assert_undisturbed(config, tiny_run)


def tell_much(metrics: Metrics) -> None:
    for step in range(10_000):
        metrics.write(step, {"note": "x" * 100})


def test_metrics_are_complete_lines_when_the_disk_is_full(disk):
    metrics = Metrics(str(disk.path), 10_000)
    disk.fill()
    with pytest.raises(OSError, match=r"metrics\.jsonl"), metrics:
        tell_much(metrics)
    lines = read_metrics(str(disk.path / "metrics.jsonl"))
    assert lines == [{"step": step, "note": "x" * 100} for step in range(len(lines))]
    disk.free()
    with Metrics(str(disk.path), 10_000, len(lines)) as metrics:
        metrics.write(len(lines), {"loss": 1.0})
    assert len(read_metrics(str(disk.path / "metrics.jsonl"))) == len(lines) + 1


def test_a_read_only_folder_is_refused_and_nothing_in_it_changes(config, tiny_run, disk, capsys, tiny_yaml):
    folder = Path(shutil.copytree(tiny_run.folder, config.run_dir))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    disk.read_only(True)
    try:
        with pytest.raises(SystemExit) as stopped:
            cli.main(["pretrain", str(tiny_yaml), "--run-dir", config.run_dir])
    finally:
        disk.read_only(False)
    assert stopped.value.code == exits.BAD_INPUT
    line = f"mora: --run-dir {config.run_dir} cannot be written to: Read-only file system\n"
    *warnings, printed = capsys.readouterr().err.splitlines(keepends=True)
    assert printed == line
    assert all("mora: warning: " in warning for warning in warnings)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_full_disk_has_a_status_of_its_own(config, disk, tiny_yaml, capsys):
    disk.fill()
    words = ["--run-dir", config.run_dir, "--compilation.cache", "off"]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["pretrain", str(tiny_yaml), *words])
    assert stopped.value.code == exits.DISK
    printed = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"mora: \S+: No space left on device", printed[-1])
    assert all("mora: warning: " in warning for warning in printed[:-1])


HOLD = """
import sys
from train.storage import lock
with lock.lock_run(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow  # tests/storage/test_lock.py locks the folder
def test_a_second_run_in_the_same_folder_is_refused(tiny_run, tmp_path):
    folder = Path(shutil.copytree(tiny_run.folder, tmp_path / "run"))
    config = dataclasses.replace(tiny_run.config, run_dir=str(folder))
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != lock.LOCK}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], **pipes) as first:
        assert first.stdout
        assert first.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match=f"is in use by process {first.pid} on"):
            loop.pretrain(config)
        first.kill()
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != lock.LOCK} == before
    assert loop.pretrain(config) == tiny_run.summary
