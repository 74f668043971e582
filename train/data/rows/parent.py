"""Worker processes end with their program. Imports little: every worker loads this before anything else."""

import multiprocessing
import os
import signal
import threading


def exit_with_parent() -> None:
    """Ends this process when its parent ends, even by SIGKILL. Leaves Ctrl-C to the parent.

    A worker uses one core.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes share the cores already
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
