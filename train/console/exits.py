"""How a program ends: the exit statuses that a supervisor reads, and the exceptions that carry them.

Status 0 is finished and 1 a bug. A second signal ends the program with 128 plus the signal's number.
"""

from typing import ClassVar

BUG = 1
BAD_INPUT = 2  # the same command will fail again
DIVERGED = 3  # too many bad steps: somebody must look at the run
DAMAGED = 4  # `mora checkpoints` found a damaged checkpoint
FAILED = 5  # `mora study`: a run failed or could not be trained; its row in the table says why
MEMORY = 71  # memory ran out, of a device or of the machine: the config must become smaller
DISK = 74  # input or output failed, such as a full disk: the same command resumes once that is mended
PREEMPTED = 75  # stopped by SIGTERM, SIGINT or SIGHUP: the same command resumes and nothing is lost
LOST = 76  # another process of the run is gone: the same command on all processes resumes
SIGNALLED = 128
INTERRUPTED = SIGNALLED + 2  # by Ctrl-C, outside of training


class Stopped(Exception):
    """A run stopped early, with a checkpoint. The message is one line that gives the reason."""

    status: ClassVar[int]


class Preempted(Stopped):
    """The run received SIGTERM, SIGINT or SIGHUP."""

    status = PREEMPTED


class Diverged(Stopped):
    """The run had too many bad steps in a row."""

    status = DIVERGED
