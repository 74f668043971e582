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

from mora_jax.errors import InputError
from train.files import writable

LOCK = "lock"


@contextlib.contextmanager
def alone(run_dir: str) -> Iterator[None]:
    """Keeps other programs from running in the folder; the system lets go of it however this one ends.

    Buckets (gs://) have no locks: there, nothing keeps two runs apart.

    Raises:
      InputError: if another program has the folder, or nothing can be written there.
      OSError: if the disk is in trouble.
    """
    if "://" in run_dir or jax.process_index() > 0:
        yield
        return
    path = Path(run_dir) / LOCK
    with writable(path, f"run_dir {run_dir} cannot be written to"):
        file = path.open("a+b", buffering=0)
    with file:
        _lock(file, run_dir)
        with contextlib.suppress(OSError):  # on a full disk; it is only for the message
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield


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
        print(f"mora: warning: {run_dir} cannot be locked: {error.strerror}", file=sys.stderr, flush=True)
