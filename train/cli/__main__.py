"""Starts `mora`, also as `python -m train.cli`."""

import os
import signal
import sys
from typing import Any

from train.console.exits import INTERRUPTED


def start() -> None:
    """Imports and runs the command line. Ctrl-C while it is imported ends it in one line, as it does later.

    An exception would be lost there: modules written in C turn it into errors of their own.
    """
    before = signal.getsignal(signal.SIGINT)
    if before != signal.SIG_IGN:
        signal.signal(signal.SIGINT, _end)
    from train.cli.main import main

    signal.signal(signal.SIGINT, before or signal.SIG_DFL)
    main()


def _end(*_: Any) -> None:
    print("mora: interrupted", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    start()
