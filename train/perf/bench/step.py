"""`mora bench step`: complete training steps side by side, each method and peer in a process of its own."""

import importlib.util
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from mora_jax.errors import InputError
from train.perf.bench import children, report
from train.perf.bench.cases import Case
from train.perf.bench.jobs import MatmulJob, PeerJob, StepJob, check_job, peer_job, step_job
from train.perf.bench.options import BenchStep
from train.perf.bench.program import NO_CUDNN
from train.perf.bench.record import Record, label, method_row, peer_row, start

JAX, TORCH = "train.perf.bench.measure", "train.perf.bench.torch_peers"
NEEDED_BY_PEERS = ("torch", "transformers", "peft")
FROZEN = "frozen"
SECONDS = 1200.0  # limit for one method
MOST_DRIFT = 0.03  # between two measurements of one program, for rows to be comparable

Work = tuple[dict[str, Any], StepJob | PeerJob]
Call = Callable[..., dict[str, Any]]


def bench(case: Case, options: BenchStep, call: Call) -> Record:
    """Measures all methods and peers, and prints the table. The file is written after every row.

    `call` does a job and returns what it measured, as `children.call` does.

    Raises:
      InputError: for bad words, a device that cannot be used, or a path whose results are wrong.
    """
    with tempfile.TemporaryDirectory(prefix="mora-bench-") as programs:
        record = measured(case, options, programs, call)
    report.show(record)
    return record


def measured(case: Case, options: BenchStep, programs: str, call: Call) -> Record:
    """Returns the record of `bench`. The folder caches the frozen base's program, which is compiled twice."""
    began = time.monotonic()
    record = start(case, options.out)
    work = list(planned(case, options, record))
    if not work:
        return record
    begin_run(record, case, call)
    if not options.no_check:
        check(record, case, [job for _, job in work if isinstance(job, StepJob)], call)
    longest = 0.0
    for what, job in work:
        spent = time.monotonic() - began
        if options.minutes and spent + longest > 60 * options.minutes:
            progress(f"{options.minutes:g} minutes are over: {label(what)} and later rows were not measured")
            break
        measure(record, what, job, options.peer_timeout, programs, call)
        longest = max(longest, time.monotonic() - began - spent)
        record.save(options.out)
    else:
        measure_drift(record, work, programs, call)
    record.save(options.out)
    return record


def planned(case: Case, options: BenchStep, record: Record) -> Iterator[Work]:
    """Yields the rows to measure, in order. Raises InputError for bad words."""
    times = options.warmup_steps, options.timed_steps
    for text in expanded(options.methods, case.methods):
        what = method_row(case, text)
        if not (options.missing and done(record, what)):
            yield what, step_job(case, text, *times, options.profiled_steps)
    peers = [peer_job(case, text, *times) for text in expanded(options.peers, case.peers)]
    absent = [name for name in NEEDED_BY_PEERS if importlib.util.find_spec(name) is None]
    if peers and absent:
        return progress(f"no peers: {', '.join(absent)} not installed (pip install 'mora_jax[parity]')")
    for job in peers:
        what = peer_row(job)
        if not (options.missing and done(record, what)):
            yield what, job


def expanded(words: tuple[str, ...], everything: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the words, split at commas. "all" stands for everything, "none" for nothing."""
    flat = [part for word in words for part in word.split(",") if part and part != "none"]
    return tuple(dict.fromkeys(w for word in flat for w in (everything if word == "all" else (word,))))


def done(record: Record, what: dict[str, Any]) -> bool:
    """Returns whether the record has a row that did not fail."""
    row = record.find(what)
    return row is not None and "error" not in row


def begin_run(record: Record, case: Case, call: Call) -> None:
    """Adds a run to the record: the matmul rate, the device and the versions."""
    found = call(JAX, MatmulJob(case.config.compute.dtype), SECONDS)
    if "error" in found:
        raise InputError(f"the device cannot be used: {found['error']}")
    if case.config.compute.attention == "cudnn" and found["platform"] != "gpu":
        raise InputError(NO_CUDNN)
    device = found.pop("device")
    if record.device not in ("", device):
        raise InputError(
            f"the figures are of another device ({record.device}), not {device}; choose another --out"
        )
    record.device = device
    record.runs.append(
        {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            **found,
            "command": " ".join(sys.argv[1:]),
            "xla_flags": os.environ.get("XLA_FLAGS", ""),
        }
    )
    progress(f"{device}: {found['matmul_tflops']:.3g} TFLOP/s ({found['matmul_side']}-cube matmul)")


def check(record: Record, case: Case, jobs: Sequence[StepJob], call: Call) -> None:
    """Raises InputError unless every path of every method agrees with its formula."""
    if not jobs:
        return
    found = call(JAX, check_job(case, jobs), SECONDS)
    if "error" in found:
        raise InputError(f"the check of the paths failed: {found['error']}")
    if found["failures"]:
        more = f" (and {len(found['failures']) - 1} more)" if len(found["failures"]) > 1 else ""
        raise InputError(f"wrong results, nothing is timed: {found['failures'][0]}{more}")
    record.runs[-1]["check"] = found["worst"]
    worst = ", ".join(f"{name} {error:.1e}" for name, error in found["worst"].items())
    progress(f"{found['compared']} comparisons with the formula, largest relative errors: {worst or 'none'}")


def measure(
    record: Record,
    what: dict[str, Any],
    job: StepJob | PeerJob,
    peer_seconds: float,
    programs: str,
    call: Call,
) -> None:
    """Measures one row."""
    if isinstance(job, PeerJob):
        figures = call(TORCH, job, peer_seconds)
    else:
        figures = call(JAX, job, SECONDS, environment(what, job, programs))
    record.put(what, figures)
    progress(f"{label(what)}: {figures.get('error') or _figures(figures)}")


def environment(what: dict[str, Any], job: StepJob, programs: str) -> dict[str, str]:
    """Returns variables for a process. Only the frozen base uses the cache: others report compile times."""
    found = dict(children.MEMORY_OF_MESHES) if math.prod(job.mesh) != 1 else {}
    if what["name"] == FROZEN:
        found |= {"JAX_COMPILATION_CACHE_DIR": programs, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return found


def measure_drift(record: Record, work: list[Work], programs: str, call: Call) -> None:
    """Measures the frozen base again, to see whether the device has become faster or slower."""
    for what, job in work:
        if isinstance(job, StepJob) and what["name"] == FROZEN and done(record, what):
            before = record.find(what) or {}
            after = call(JAX, job, SECONDS, environment(what, job, programs))
            if "error" not in after:
                record.runs[-1]["frozen_milliseconds"] = [before["milliseconds"], after["milliseconds"]]
                drift = after["milliseconds"] / before["milliseconds"] - 1
                progress(f"{label(what)} again: {_figures(after)} (drift {drift:+.1%})")
                if abs(drift) > MOST_DRIFT:
                    progress("the device has become faster or slower: do not compare these rows")


def progress(sentence: str) -> None:
    """Prints a line of progress."""
    print(sentence, flush=True)


def _figures(figures: dict[str, Any]) -> str:
    return f"{figures['milliseconds']:.2f} ms, {figures['tokens_per_second']:,.0f} tokens/s"
