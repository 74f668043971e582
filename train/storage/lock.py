"""One program at a time in a folder."""

import contextlib
import fcntl
import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from etils import epath

from mora_jax.errors import InputError
from train.console.terminal import log, warn
from train.storage import buckets
from train.storage.files import open_own, remove_parts, writable

LOCK = "lock"
# What this program writes into a lock. A file with anything else is somebody's own.
_HOLDER = re.compile(rb"process \d*( on \S*)?")


def local_folder(run_dir: str) -> Path:
    """Returns the folder on a disk that is locked for a run: its own, or the stand-in of one in a bucket."""
    return buckets.stand_in("runs", run_dir) if buckets.in_bucket(run_dir) else Path(run_dir)


@contextlib.contextmanager
def lock_run(run_dir: str) -> Iterator[Callable[[], None]]:
    """Keeps other programs out of a run's folder. The system releases the lock however this program ends.

    Buckets have no locks. There, programs on this machine are kept out, and one on another machine causes a
    warning.

    Yields:
      A function that raises InputError if the locked folder was removed.

    Raises:
      InputError: if another program has locked the folder, or it cannot be written to.
      OSError: if the disk or the bucket is in trouble.
    """
    if jax.process_index() > 0:
        yield lambda: None
        return
    note = _note(run_dir) if buckets.in_bucket(run_dir) else contextlib.nullcontext()
    with lock_file(local_folder(run_dir) / LOCK, "--run-dir", run_dir) as check_there, note:
        yield check_there


def holder(run_dir: str) -> str:
    """Returns which program has locked a run's folder on this machine; empty if none has.

    The caller must not hold the lock: asking would release it.
    """
    with contextlib.suppress(OSError), (local_folder(run_dir) / LOCK).open("r+b") as file:
        if not _try_lock(file, run_dir):
            return file.read(1000).decode(errors="replace") or "another program"
    return ""


@contextlib.contextmanager
def lock_file(path: Path, flag: str, folder: str) -> Iterator[Callable[[], None]]:
    """Locks a file, which is made with its folder, against other programs on this machine.

    Args:
      path: the file.
      flag: the flag that names the locked folder, such as "--run-dir".
      folder: the folder as the user names it.

    Yields:
      A function that raises InputError if the file was removed, perhaps with its folder.

    Raises:
      InputError: if another program has locked it, or it cannot be written to.
      OSError: if the disk is in trouble.
    """
    with _locked(path, flag, folder) as file:
        with contextlib.suppress(OSError):  # a full disk: the text is only for the message above
            file.truncate(0)
            file.write(_this_process().encode())
        yield lambda: _check_there(path, file, folder)


@contextlib.contextmanager
def lock_output(path: str, flag: str) -> Iterator[None]:
    """Keeps other programs on this machine from writing the same file or folder, which need not exist yet.

    The lock is a hidden file beside it, or on this machine's disk for one in a bucket. It is removed at the
    end. What killed programs left of the file is removed at the start.

    Args:
      path: what is written.
      flag: what names it, such as "--out".

    Raises:
      InputError: if another program writes it, or its parent cannot be written to.
      OSError: if the disk is in trouble.
    """
    place = buckets.stand_in("output", path) if buckets.in_bucket(path) else Path(path).absolute()
    file = place.with_name(f".{place.name}.mora-lock")
    with lock_file(file, flag, path):
        try:
            remove_parts(place.parent, place.name)
            yield
        finally:
            file.unlink(missing_ok=True)  # still locked: who has opened it finds it gone


@contextlib.contextmanager
def wait_for_lock(path: Path, waiting: str) -> Iterator[None]:
    """Locks a file, which is made with its folder, and waits while another program on this machine has it.

    Args:
      path: the file.
      waiting: logged before waiting.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_own(path, "ab") as file:
        if not _try_lock(file, str(path.parent)):
            log(waiting, every_process=True)
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def _locked(path: Path, flag: str, folder: str) -> Any:
    """Returns the file of `lock_file`, opened and locked."""
    while True:
        with writable(path, f"{flag} {folder} cannot be written to"):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open_own(path, "a+b")
        with contextlib.ExitStack() as closing:
            closing.enter_context(file)
            locked = _try_lock(file, folder)
            file.seek(0)
            content = file.read(1000)
            if content and not _HOLDER.fullmatch(content):
                raise InputError(f"{path} is not a lock of mora; move it, or choose another {flag}")
            if not locked:
                holder = content.decode(errors="replace") or "another program"
                raise InputError(
                    f"{folder} is in use by {holder}; wait for it, stop it, or choose another {flag}"
                )
            if _is_there(path, file):  # else its holder removed it meanwhile
                closing.pop_all()
                return file


def _try_lock(file: Any, folder: str) -> bool:
    """Locks an open file; False if another program has it. A file system without locks causes a warning."""
    # A POSIX lock belongs to the process. One of the open file (flock, as filelock uses) would be inherited
    # by a child that outlives the program.
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        warn(
            [f"{folder} cannot be locked: {error.strerror}; make sure that no other program uses it"],
            every_process=True,
        )
    return True


@contextlib.contextmanager
def _note(run_dir: str) -> Iterator[None]:
    """Leaves a note in the bucket during the run. A program on another machine reads it and warns."""
    note, me = epath.Path(run_dir) / LOCK, _this_process()
    try:
        with buckets.store_errors(str(note)):
            holder = note.read_text() if note.exists() else ""
            if holder and not holder.startswith("process "):
                raise InputError(f"{note} is not a lock of mora; move it, or choose another --run-dir")
            note.write_text(me)
    except (FileNotFoundError, PermissionError) as error:
        raise InputError(f"--run-dir {run_dir} cannot be written to: {error.strerror}") from error
    if holder and holder.partition(" on ")[2] != socket.gethostname():
        warn([f"{holder} did not release {run_dir}: it was killed, or still runs and must be stopped"])
    try:
        yield
    finally:
        with contextlib.suppress(Exception):
            if note.read_text() == me:  # not the note of a program that started meanwhile
                note.unlink()


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _check_there(path: Path, file: Any, folder: str) -> None:
    if not _is_there(path, file):
        raise InputError(f"{folder}, or the file {LOCK} in it, was removed during the run; nothing is saved")


def _is_there(path: Path, file: Any) -> bool:
    """Returns whether an open file is still the one of that name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
