"""One run at a time in a folder."""

import contextlib
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from etils import epath

from mora_jax.errors import InputError
from train import buckets
from train.files import writable

LOCK = "lock"


def place(run_dir: str) -> Path:
    """The folder of a disk that is locked: the run's, or the one that stands in for a bucket's."""
    return buckets.stand_in("runs", run_dir) if buckets.in_bucket(run_dir) else Path(run_dir)


@contextlib.contextmanager
def alone(run_dir: str) -> Iterator[None]:
    """Keeps other programs from running in the folder; the system lets go of it however this one ends.

    Buckets have no locks: there it keeps programs of this machine apart, and warns of one on another.

    Raises:
      InputError: if another program has the folder, or nothing can be written there.
      OSError: if the disk or the bucket is in trouble.
    """
    if jax.process_index() > 0:
        yield
        return
    path = place(run_dir) / LOCK
    with writable(path, f"run_dir {run_dir} cannot be written to"):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b", buffering=0)
    me = f"process {os.getpid()} on {socket.gethostname()}"
    with file:
        _lock(file, run_dir)
        with contextlib.suppress(OSError):  # on a full disk; it is only for the message
            file.truncate(0)
            file.write(me.encode())
        with _noted(run_dir, me) if buckets.in_bucket(run_dir) else contextlib.nullcontext():
            yield


@contextlib.contextmanager
def _noted(run_dir: str, me: str) -> Iterator[None]:
    """Leaves a note in the bucket while the run lasts: a program on another machine reads it and warns."""
    note = epath.Path(run_dir) / LOCK
    try:
        with buckets.told(str(note)):
            holder = note.read_text() if note.exists() else ""
            note.write_text(me)
    except (FileNotFoundError, PermissionError) as error:
        raise InputError(f"run_dir {run_dir} cannot be written to: {error.strerror}") from error
    if holder and holder.partition(" on ")[2] != socket.gethostname():
        _warn(f"{run_dir} was not left by {holder}: it was killed, or still runs there and must be stopped")
    try:
        yield
    finally:
        with contextlib.suppress(Exception):
            if note.read_text() == me:  # not that of a program which began meanwhile
                note.unlink()


def _lock(file: Any, run_dir: str) -> None:
    # Of the process and not of the open file: a child that outlives the program must not keep it.
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = file.read().decode() or "another program"
        raise InputError(
            f"{run_dir} is in use by {holder}; wait for it, stop it, or choose another --run-dir"
        ) from None
    except OSError as error:  # a file system without locks
        _warn(f"{run_dir} cannot be locked: {error.strerror}")


def _warn(sentence: str) -> None:
    print(f"mora: warning: {sentence}", file=sys.stderr, flush=True)
