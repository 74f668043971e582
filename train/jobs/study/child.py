"""Runs `mora` with these words, and ends when the study that started it is gone.

Usage: python -m train.jobs.study.child PARENT WORDS...

A study that is killed cannot stop its runs. Linux then sends them SIGTERM, and they stop with a checkpoint.
"""

import os
import signal
import sys

from train.runtime.parent import end_with_parent


def main(parent: int, words: list[str]) -> None:
    """Becomes `mora WORDS`."""
    end_with_parent(parent, signal.SIGTERM)
    os.execv(sys.executable, [sys.executable, "-m", "train.cli", *words])


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
