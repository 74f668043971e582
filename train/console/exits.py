"""How a program ends: the statuses that a supervisor reads, and the errors that carry them.

0 is finished and 1 a bug, as everywhere; after a second signal it is 128 and the signal's
number, as a shell says.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

BUG = 1
BAD_INPUT = 2  # the same command will fail again
DIVERGED = 3  # as it is, the run leads nowhere: somebody must look at it
DAMAGED = 4  # `mora checkpoints`: one is not as it was saved
DISK = 74  # input or output failed, such as a full disk: the same command goes on once that is mended
PREEMPTED = 75  # stopped by SIGTERM, SIGINT or SIGHUP: the same command goes on, nothing is lost
LOST = 76  # another process of the run is gone: the same command, on all of them, goes on
SIGNALLED = 128
INTERRUPTED = SIGNALLED + 2  # by Ctrl-C, outside of training


class Stopped(Exception):
    """A run has stopped before its end, with a checkpoint; one line says why."""

    status: ClassVar[int]


class Preempted(Stopped):
    """Somebody asked for it, by SIGTERM, SIGINT or SIGHUP."""

    status = PREEMPTED


class Diverged(Stopped):
    """Too many bad steps in a row."""

    status = DIVERGED


@contextlib.contextmanager
def naming(path: Any) -> Iterator[None]:
    """Names what an OSError inside is about; the system does not, once a file is open."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
