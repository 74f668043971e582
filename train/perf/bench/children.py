"""Measurements in processes of their own: each has the device to itself, and leaves nothing on it."""

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Each process is alone on its device.
ENVIRONMENT = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95", "TOKENIZERS_PARALLELISM": "false"}


def call(module: str, job: Any, seconds: float, environment: dict[str, str] = ENVIRONMENT) -> dict[str, Any]:
    """Has `python -m module` do a job, as its `serve` says.

    Args:
      module: a module that calls `serve` when it is run.
      job: what it is to do; can be pickled.
      seconds: its time limit.
      environment: variables it gets beside those of this process, which go over them.

    Returns:
      What it measured, or {"error": one line} where it failed, died or took too long.
    """
    with tempfile.TemporaryDirectory(prefix="mora-bench-") as folder:
        out, log = Path(folder) / "result.json", Path(folder) / "log"
        with log.open("wb") as stream:
            child = subprocess.Popen(
                [sys.executable, "-m", module, str(out)],
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=stream,
                env={**environment, **os.environ},
                start_new_session=True,
            )
            try:
                child.communicate(pickle.dumps(job), timeout=seconds)
            except subprocess.TimeoutExpired:
                return {"error": f"took more than {seconds:.0f} s"}
            finally:
                _end(child)  # and the processes that it started, such as PyTorch's compilers
        if out.exists():
            return json.loads(out.read_text())
        return {"error": f"died with status {child.returncode}: {_last_line(log)}"}


def serve(function: Callable[[Any], dict[str, Any]]) -> None:
    """The other side of `call`: does the job that stands on the standard input, and writes what came out."""
    job = pickle.load(sys.stdin.buffer)
    try:
        result = function(job)
    except Exception as error:
        traceback.print_exc()
        result = {"error": _one_line(error)}
    out = Path(sys.argv[1])
    part = out.with_suffix(".part")
    part.write_text(json.dumps(result))
    part.replace(out)


def _end(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it printed nothing"
