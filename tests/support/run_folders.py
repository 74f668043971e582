"""What a run's folder holds: its log, its checkpoints and its last arrays."""

import collections
import contextlib
import hashlib
import json
import os
from pathlib import Path

import jax
import numpy as np

from mora_jax import sharding
from train.run.folder import open_checkpoints, read_config
from train.run.manifest import MANIFEST
from train.run.state import restore_state

TIMES = ("data_wait", "tokens_per_second")  # differ from run to run


def identity(run_dir: Path) -> int:
    """Returns what identifies a metrics.jsonl: each program writes a new file. 0 if there is none."""
    path = run_dir / "metrics.jsonl"
    return path.stat().st_ino if path.exists() else 0


def updates(run_dir: Path) -> int:
    """Returns how many updates are logged. It must be quick, so it reads only the end of the file."""
    with contextlib.suppress(OSError), (run_dir / "metrics.jsonl").open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 2000))
        return max([json.loads(line)["step"] + 1 for line in file.read().split(b"\n")[1:-1]], default=0)
    return 0


def is_saving(run_dir: Path) -> bool:
    """Returns whether a save is in progress, or was interrupted."""
    with contextlib.suppress(OSError):
        for folder in (run_dir / "checkpoints").iterdir():
            if not (folder / MANIFEST).exists():
                return True
    return False


def logged(run_dir: Path) -> dict[str, dict]:
    """Returns all whole lines of a run by subject, without what differs from run to run."""
    return {subject(line): line for line in whole_lines(run_dir)}


def missing_or_repeated(run_dir: Path, other: Path) -> int:
    """Returns how many lines of one finished run are missing or repeated in the other."""
    ours, theirs = (collections.Counter(map(subject, whole_lines(folder))) for folder in (run_dir, other))
    return ((ours - theirs) + (theirs - ours)).total()


def whole_lines(run_dir: Path) -> list[dict]:
    """Returns all whole lines of a run in order."""
    return [without_times(line) for line in (run_dir / "metrics.jsonl").read_text().split("\n")[:-1]]


def without_times(line: str) -> dict:
    """Returns a line without what differs from run to run."""
    return {name: value for name, value in json.loads(line).items() if name not in TIMES}


def subject(line: dict) -> str:
    """Returns the step of a line and its kind."""
    kinds = [kind for kind in ("loss", "restart", "validation_loss") if kind in line]
    return f"{line['step']} {kinds[0]}"


def hash_of_arrays(run_dir: Path) -> str:
    """Returns the hash of all arrays of a finished run's last checkpoint."""
    config = read_config(str(run_dir))
    with open_checkpoints(config) as saved:
        state, _ = restore_state(config, saved, config.steps, sharding.make_mesh(1))
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
