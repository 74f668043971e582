"""Runs `mora` with these words, and ends when the study that started it is gone.

Usage: python -m train.jobs.study.child PARENT WORDS...

A study that is killed cannot stop its runs. Linux then sends them SIGTERM, and they stop with a checkpoint.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(parent: int, words: list[str]) -> None:
    """Becomes `mora WORDS`."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it was killed before
            sys.exit(1)
    os.execv(sys.executable, [sys.executable, "-m", "train.cli", *words])


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
