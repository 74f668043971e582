"""Runs measurements in processes of their own. Each has the device to itself, and leaves nothing on it."""

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# Each process is alone on its device.
ENVIRONMENT = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95", "TOKENIZERS_PARALLELISM": "false"}
LONGEST_LINE = 300


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
    # A job may hold objects of classes that the caller found on its own path, such as a user's method.
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), *sys.path)))
    with tempfile.TemporaryDirectory(prefix="mora-bench-") as folder:
        out, log = Path(folder) / "result.json", Path(folder) / "log"
        with log.open("wb") as stream:
            child = subprocess.Popen(
                [sys.executable, "-m", module, str(out)],
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=stream,
                env={**ENVIRONMENT, **(environment or {}), **os.environ, "PYTHONPATH": path},
                start_new_session=True,
            )
            try:
                child.communicate(pickle.dumps(job), timeout=seconds)
            except subprocess.TimeoutExpired:
                return {"error": f"timed out after {seconds:.0f} s"}
            finally:
                # Ends the processes that the child started, too, such as PyTorch's compilers.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        if out.exists():
            return json.loads(out.read_text())
        lines = _lines(log.read_text(errors="replace"))
        return {
            "error": f"died with status {child.returncode}: {lines[-1] if lines else 'it printed nothing'}"
        }


def serve(function: Callable[[Any], dict[str, Any]]) -> None:
    """Does the job on the standard input, and writes what `function` returns for `call`."""
    job = pickle.load(sys.stdin.buffer)
    try:
        result = function(job)
    except Exception as error:
        traceback.print_exc()
        result = {"error": ": ".join([type(error).__name__, *_lines(str(error))[:1]])}
    out = Path(sys.argv[1])
    part = out.with_suffix(".part")
    part.write_text(json.dumps(result))
    part.replace(out)


def _lines(text: str) -> list[str]:
    """Returns the lines of a text that are not blank, shortened."""
    return [line.strip()[:LONGEST_LINE] for line in text.splitlines() if line.strip()]
