"""What tests of whole runs share: reading what a run left, comparing two runs, and stopping one."""

import os
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from mora_jax import sharding
from train.jobs import pretrain as loop
from train.run.checkpoint import Checkpoints
from train.run.metrics import read_metrics
from train.run.state import restore_state

TIMES = ("data_wait", "tokens_per_second")  # differ from run to run


class Interrupted(Exception):
    """Stands for whatever stops a program."""


def lines(folder: Path) -> list[dict]:
    return read_metrics(str(folder / "metrics.jsonl"))


def without_times(folder: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines(folder)]


def arrays(config, folder: Path, step: int) -> list[np.ndarray]:
    """Every array of a checkpoint: step, parameters, adapters, optimizer state."""
    with Checkpoints(str(folder / "checkpoints")) as saved:
        state, _ = restore_state(config, saved, step, sharding.make_mesh(1))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def stop_after(monkeypatch: pytest.MonkeyPatch, updates: int) -> None:
    """Lets `pretrain` do so many updates, and then fail to get a batch."""
    real = loop.train_batches

    def some(*args):
        batches = real(*args)
        for _ in range(updates + 1):  # one is fetched ahead
            yield next(batches)
        raise Interrupted

    monkeypatch.setattr(loop, "train_batches", some)


def signalled_at(monkeypatch: pytest.MonkeyPatch, update: int) -> None:
    """Sends SIGTERM to this program as the batch of an update is asked for."""
    real, asked = loop.next_batch, iter(range(update + 1))

    def next_batch(*args):
        if next(asked, None) == update:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)  # for the thread that hears it
        return real(*args)

    monkeypatch.setattr(loop, "next_batch", next_batch)


def equal_runs(config, folder: Path, other: Path) -> None:
    for ours, theirs in zip(arrays(config, folder, 22), arrays(config, other, 22), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert without_times(folder) == without_times(other)


def killed(*_: object) -> None:
    raise Interrupted
