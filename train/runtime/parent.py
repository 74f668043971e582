"""Processes that end with the one that started them."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int, by: signal.Signals) -> None:
    """Makes Linux send this process a signal when its parent ends, in whatever way. Other systems do not.

    The parent is the thread that started this process, and `exec` changes nothing. The process exits at once
    if its parent has ended already.

    Args:
      parent: the parent's process number.
      by: the signal.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, by)
        if os.getppid() != parent:
            sys.exit(1)
