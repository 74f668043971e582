"""`mora bench step` as one of several processes, which compute each step together.

A process that is one of several cannot give its devices to children, so it measures all rows itself.
"""

import contextlib
import dataclasses
import io
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax

from mora_jax.errors import InputError
from train.perf.bench import children
from train.perf.bench.cases import Case
from train.perf.bench.options import BenchStep
from train.perf.bench.record import Record
from train.perf.bench.step import bench
from train.runtime import backend
from train.runtime.distributed import joined, several


def bench_step(case: Case, options: BenchStep, explain: Callable[[BaseException], int]) -> Record:
    """Runs `step.bench`, in this process if it is one of several. Process 0 prints and writes the figures.

    Args:
      case: model and batch.
      options: what to measure.
      explain: prints what an error means, and returns the exit status.

    Raises:
      InputError: as `step.bench` and `joined`, and for options that processes would not understand alike.
    """
    distributed = case.config.distributed
    if not several(distributed, os.environ):
        return bench(case, options, children.call)
    if options.missing or options.minutes or set(options.peers) != {"none"}:
        raise InputError("--missing, --minutes and --peers need a single process")
    for name, value in (children.ENVIRONMENT | children.MEMORY_OF_MESHES).items():
        os.environ.setdefault(name, value)
    with joined(distributed, explain):
        backend.set_flags(case.config.deterministic)  # before anything starts JAX
        if jax.process_index() == 0:
            return bench(case, options, here)
        with contextlib.redirect_stdout(io.StringIO()):
            return bench(case, dataclasses.replace(options, out=""), here)


def here(
    module: str, job: Any, seconds: float, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Does a job of one row in this process. The other arguments are those of `children.call`."""
    from train.perf.bench.measure import run

    try:
        found = run(job)
        assert isinstance(found, dict)
        return found
    except Exception as error:
        return {"error": children.one_line(error)}
