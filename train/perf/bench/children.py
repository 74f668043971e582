"""Runs measurements in processes of their own. Each has the device to itself, and leaves nothing on it."""

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from train.runtime.parent import end_with_parent

# Each process is alone on its device.
ENVIRONMENT = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95", "TOKENIZERS_PARALLELISM": "false"}
# NCCL's buffers are not in JAX's share of the memory.
MEMORY_OF_MESHES = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}
LONGEST_LINE = 300
POLL = 0.1  # seconds between two looks at what a process has written


def call(
    module: str, job: Any, seconds: float, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Runs a job in a process, `python -m module`.

    Args:
      module: a module that calls `serve` if it is run.
      job: what to do; it must be picklable.
      seconds: time limit.
      environment: variables for the process besides ENVIRONMENT. Those of this process override both.

    Returns:
      What the process measured, or {"error": one line} if it failed, died or timed out.
    """
    *_, last = stream(module, job, seconds, environment)
    return last


def stream(
    module: str, job: Any, seconds: float, environment: Mapping[str, str] | None = None
) -> Generator[dict[str, Any], None, None]:
    """Yields what a process measures, each row when it is there; arguments as of `call`.

    Each row has this time limit, which also ends a process whose devices wait for each other. If the process
    failed, died or timed out, the last row is {"error": one line}.
    """
    with tempfile.TemporaryDirectory(prefix="mora-bench-") as folder:
        out, log = Path(folder) / "rows.jsonl", Path(folder) / "log"
        out.touch()
        with _started(module, job, out, log, environment or {}) as child, out.open() as rows:
            until = time.monotonic() + seconds
            while (ended := child.poll() is not None) or time.monotonic() < until:
                found = [json.loads(line) for line in _whole_lines(rows)]
                yield from (row for row in found if row)
                until = time.monotonic() + seconds if found else until
                if found and not found[-1]:  # an empty row is the last
                    return
                if ended:
                    lines = _lines(log.read_text(errors="replace"))
                    why = lines[-1] if lines else "it printed nothing"
                    yield {"error": f"died with status {child.returncode}: {why}"}
                    return
                time.sleep(POLL)
            yield {"error": f"timed out after {seconds:.0f} s"}


@contextlib.contextmanager
def _started(
    module: str, job: Any, out: Path, log: Path, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Starts a process that writes rows to a file, and ends it with all that it started."""
    # A job may hold objects of classes that the caller found on its own path, such as a user's method.
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), *sys.path)))
    with log.open("wb") as stream:
        child = subprocess.Popen(
            [sys.executable, "-m", module, str(out), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=stream,
            stderr=stream,
            env={**ENVIRONMENT, **environment, **os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )
        assert child.stdin
        try:
            with contextlib.suppress(BrokenPipeError), child.stdin:
                child.stdin.write(pickle.dumps(job))
            yield child
        finally:
            # Ends the processes that the child started, too, such as PyTorch's compilers.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def serve(function: Callable[[Any], dict[str, Any] | Iterator[dict[str, Any]]]) -> None:
    """Does the job on the standard input, and writes what `function` returns for `call` or `stream`."""
    # A caller that is killed cannot end this process, which would keep the devices' memory.
    end_with_parent(int(sys.argv[2]), signal.SIGKILL)
    job = pickle.load(sys.stdin.buffer)
    with Path(sys.argv[1]).open("a") as out:

        def write(row: dict[str, Any]) -> None:
            out.write(json.dumps(row) + "\n")
            out.flush()

        try:
            found = function(job)
            for row in [found] if isinstance(found, dict) else found:
                write(row)
        except Exception as error:
            traceback.print_exc()
            write({"error": one_line(error)})
        write({})


def one_line(error: BaseException) -> str:
    """Returns the name of an error and the first line of what it says."""
    return ": ".join([type(error).__name__, *_lines(str(error))[:1]])


def _whole_lines(rows: TextIO) -> Iterator[str]:
    """Yields the lines that are written to their ends."""
    while True:
        place = rows.tell()
        line = rows.readline()
        if not line.endswith("\n"):
            rows.seek(place)
            return
        yield line


def _lines(text: str) -> list[str]:
    """Returns the lines of a text that are not blank, shortened."""
    return [line.strip()[:LONGEST_LINE] for line in text.splitlines() if line.strip()]
