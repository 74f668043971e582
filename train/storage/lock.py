"""One program at a time in a folder."""

import contextlib
import fcntl
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from etils import epath

from mora_jax.errors import InputError, spelled_out
from train.storage import buckets
from train.storage.files import writable

LOCK = "lock"


def place(run_dir: str) -> Path:
    """The folder of a disk that is locked: the run's, or the one that stands in for a bucket's."""
    return buckets.stand_in("runs", run_dir) if buckets.in_bucket(run_dir) else Path(run_dir)


@contextlib.contextmanager
def alone(run_dir: str) -> Iterator[Callable[[], None]]:
    """Keeps other programs from running in the folder; the system lets go of it however this one ends.

    Buckets have no locks: there it keeps programs of this machine apart, and warns of one on another.

    Yields:
      A function that raises InputError if the folder that was locked is there no more.

    Raises:
      InputError: if another program has the folder, or nothing can be written there.
      OSError: if the disk or the bucket is in trouble.
    """
    if jax.process_index() > 0:
        yield lambda: None
        return
    noted = _noted(run_dir) if buckets.in_bucket(run_dir) else contextlib.nullcontext()
    with held(place(run_dir) / LOCK, "run_dir", run_dir) as check, noted:
        yield check


@contextlib.contextmanager
def held(path: Path, option: str, folder: str) -> Iterator[Callable[[], None]]:
    """Keeps other programs of this machine from the file of a lock, which is made with its folder.

    Args:
      path: the file.
      option: where the user names the folder that the lock is for.
      folder: it, as the user names it.

    Yields:
      A function that raises InputError if that file, with its folder perhaps, was removed.

    Raises:
      InputError: if another program has it, or nothing can be written there.
      OSError: if the disk is in trouble.
    """
    with writable(path, f"{option} {folder} cannot be written to"):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b", buffering=0)
    with file:
        _lock(file, option, folder)
        with contextlib.suppress(OSError):  # on a full disk; it is only for the message
            file.truncate(0)
            file.write(_me().encode())
        yield lambda: _check_there(path, file, folder)


def _me() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


@contextlib.contextmanager
def _noted(run_dir: str) -> Iterator[None]:
    """Leaves a note in the bucket while the run lasts: a program on another machine reads it and warns."""
    note, me = epath.Path(run_dir) / LOCK, _me()
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


def _lock(file: Any, option: str, folder: str) -> None:
    # Of the process and not of the open file: a child that outlives the program must not keep it.
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = file.read(1000).decode(errors="replace") or "another program"
        flag = option.replace("_", "-")
        raise InputError(
            f"{folder} is in use by {holder}; wait for it, stop it, or choose another --{flag}"
        ) from None
    except OSError as error:  # a file system without locks
        _warn(f"{folder} cannot be locked: {error.strerror}")


def _check_there(path: Path, file: Any, folder: str) -> None:
    try:
        there = os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        there = False
    if not there:
        raise InputError(
            f"{folder}, or the file {LOCK} in it, was removed while it was in use; nothing is saved"
        )


def _warn(sentence: str) -> None:
    print(f"mora: warning: {spelled_out(sentence)}", file=sys.stderr, flush=True)
