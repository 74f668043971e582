"""What needs internals of libraries. Each function names the version, and why no public way serves."""

import contextlib
import ctypes
import functools
import glob
import logging
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from etils import epath
from jax._src import distributed, xla_bridge
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh
from orbax.checkpoint._src.futures import future


def jax_has_started() -> bool:
    """Returns whether JAX has initialised its backends, without initialising them.

    JAX 0.10 to 0.12. XLA reads XLA_FLAGS once, when the backends start. Every public function that would
    answer, such as `jax.devices`, starts them.
    """
    return xla_bridge.backends_are_initialized()


def coordinator() -> tuple[Any, int, int]:
    """Returns the client of the coordinator's key-value store (None in a single process), index and count.

    JAX 0.10 to 0.12. What `jax.experimental.multihost_utils` offers instead starts the devices and compiles a
    program, which hangs if the processes were started differently.
    """
    state = distributed.global_state
    return state.client, state.process_id, state.num_processes


def reset_compilation_cache() -> None:
    """Makes JAX read its options of the compilation cache again.

    JAX 0.10 to 0.12 reads them once, with the first program. The function is in `jax.experimental`.
    """
    compilation_cache.reset_cache()


def raised_by_compilation_cache(error: BaseException) -> bool:
    """Returns whether JAX's reading or writing of a cached program raised an error.

    JAX 0.10 to 0.12. Errors of the system have no file name then. Only its traceback, which passes
    through `compilation_cache.py`, says that it concerns the cache.
    """
    frames = traceback.extract_tb(error.__traceback__)
    return any(Path(frame.filename).name == "compilation_cache.py" for frame in frames)


def may_deadlock_if_kept(mesh: Mesh) -> bool:
    """Returns whether programs for a mesh must be compiled in every process, and not loaded from the cache.

    jaxlib 0.10 to 0.12 on several CPUs. All devices run collectives in one order. A program that was saved
    has lost it: each of its loops has an order of its own (xla/backends/cpu/runtime/thunk_proto_serdes.cc).
    One device then waits in a collective of a loop, another in one beside it, until no thread is left.
    That was seen with jaxlib 0.10 only; 0.12 saves programs alike.
    """
    return mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"


def take_folders_literally() -> None:
    """Makes `epath.Path.glob` take the folder as it is spelled, so that `[1]` in its name is no pattern.

    etils 1.13 to 1.15 globs the folder's path with the pattern. orbax 0.12 looks for its own files that way,
    finds none in such a folder, and leaves out a part of the checkpoint without an error. May be called
    again.
    """
    kind = type(epath.Path("/"))  # that of paths in buckets too
    real = kind.glob
    if hasattr(real, "__wrapped__"):
        return

    @functools.wraps(real)
    def found(self: Any, pattern: str) -> Iterator[Any]:
        return real(type(self)(glob.escape(str(self))), pattern)

    kind.glob = found


@contextlib.contextmanager
def on_abort(last_words: Callable[[], int]) -> Iterator[None]:
    """Calls `last_words` if the process aborts, and exits with the status that it returns.

    jaxlib 0.10 to 0.12. If another process is gone, the distributed runtime calls abort() after a page of its
    own. JAX accepts a callback for this, but cannot call it: it cannot convert the reason. Python's own
    handlers wait for the main thread, which may never return from a call, so the handler is set by ctypes.
    """

    def handle(_: int) -> None:
        os._exit(last_words())

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)  # must outlive its registration
    register = ctypes.CDLL(None).signal
    register(int(signal.SIGABRT), handler)
    try:
        yield
    finally:
        register(int(signal.SIGABRT), None)  # the default


def end_failed_save() -> None:
    """Ends the threads of a save that failed elsewhere. Returns when all have ended, or after ten seconds.

    orbax 0.12. They may wait five minutes for a folder that could not be made. The program cannot exit
    before, and then they log pages of tracebacks. Nothing public cancels a save.
    """
    # What the threads would have done.
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    waiting = [t for t in threading.enumerate() if isinstance(t, future._SignalingThread)]
    for thread in waiting:
        thread.cancel()  # it does nothing after its wait, which ends now
        future.set_signals(thread._receive_signals, operation_id=thread._operation_id)
    until = time.monotonic() + 10
    for thread in waiting:
        threading.Thread.join(thread, max(0, until - time.monotonic()))


def ignore_closed_loops() -> None:
    """Drops errors of callbacks to an event loop that has ended. May be called again.

    orbax 0.12. If several files of a save fail, it ends its loop with the first error. TensorStore reports
    the others to that loop later, and Python prints a traceback for each.
    """
    report = sys.unraisablehook
    if hasattr(report, "__wrapped__"):
        return

    @functools.wraps(report)
    def reported(found: Any) -> None:
        if not (isinstance(found.exc_value, RuntimeError) and str(found.exc_value) == "Event loop is closed"):
            report(found)

    sys.unraisablehook = reported


def drop_logged_tracebacks() -> None:
    """Drops log records of absl that carry a traceback, from now on. May be called again.

    orbax 0.12 logs pages about each exception that it also raises, in threads of its own and at any time, and
    has no switch for it.
    """
    logging.getLogger("absl").addFilter(_has_no_traceback)


def _has_no_traceback(record: logging.LogRecord) -> bool:
    return record.exc_info is None
