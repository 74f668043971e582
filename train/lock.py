"""One run at a time in a folder."""

import contextlib
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import jax

from mora_jax.errors import InputError

LOCK = "lock"


@contextlib.contextmanager
def alone(run_dir: str) -> Iterator[None]:
    """Keeps other programs from running in the folder; the system lets go of it however this one ends.

    Buckets (gs://) have no locks: there, nothing keeps two runs apart.

    Raises:
      InputError: if another program has the folder, or nothing can be written there.
    """
    if "://" in run_dir or jax.process_index() > 0:
        yield
        return
    path = Path(run_dir) / LOCK
    try:
        file = path.open("a+")
    except OSError as error:
        raise InputError(f"run_dir {run_dir} cannot be written to: {error.strerror}") from error
    with file:
        # Of the process and not of the open file: a child that outlives the program must not keep it.
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise InputError(
                f"{run_dir} is in use by {file.read() or 'another program'}; wait for it, stop it, or choose "
                "another --run-dir"
            ) from None
        except OSError as error:  # a file system without locks
            print(f"mora: warning: {path} cannot be locked: {error.strerror}", file=sys.stderr, flush=True)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
