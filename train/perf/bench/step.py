"""Whole training steps side by side, each method and each peer in a process of its own: `mora bench step`."""

import importlib.util
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from mora_jax.errors import InputError
from train.perf.bench import children, report
from train.perf.bench.cases import Case
from train.perf.bench.jobs import CheckJob, MatmulJob, PeerJob, StepJob, peer_job
from train.perf.bench.options import BenchStep
from train.perf.bench.record import Record, label, method_row, peer_row, start

JAX, TORCH = "train.perf.bench.measure", "train.perf.bench.torch_peers"
NEEDED_BY_PEERS = ("torch", "transformers", "peft")
FROZEN = "frozen"
SECONDS = 1200.0  # that one method may take
MOST_DRIFT = 0.03  # between two measurements of one program, for rows to be compared

Work = tuple[dict[str, Any], StepJob | PeerJob]


def bench(case: Case, options: BenchStep) -> Record:
    """Measures all that is asked for, writing the file after every row, and prints the table.

    Raises:
      InputError: for words that say nothing, a device that cannot be used, or a path whose results are wrong.
    """
    with tempfile.TemporaryDirectory(prefix="mora-bench-") as programs:
        record = measured(case, options, programs)
    report.show(record)
    return record


def measured(case: Case, options: BenchStep, programs: str) -> Record:
    """As `bench`; a folder keeps the frozen base's compiled program, which is measured twice."""
    began = time.monotonic()
    record = start(case, options.out)
    work = list(planned(case, options, record))
    if not work:
        return record
    begin_run(record, case)
    if not options.no_check:
        check(record, case, [job.method for _, job in work if isinstance(job, StepJob)])
    longest = 0.0
    for what, job in work:
        spent = time.monotonic() - began
        if options.minutes and spent + longest > 60 * options.minutes:
            tell(f"{options.minutes:g} minutes are over: {label(what)} and what follows was not measured")
            break
        measure(record, what, job, options.peer_timeout, programs)
        longest = max(longest, time.monotonic() - began - spent)
        record.save(options.out)
    else:
        again(record, work, programs)
    record.save(options.out)
    return record


def planned(case: Case, options: BenchStep, record: Record) -> Iterator[Work]:
    """What is to be measured, in order. Raises InputError for words that say nothing."""
    times = options.warmup_steps, options.timed_steps
    for text in expanded(options.methods, case.methods):
        what = method_row(case, text)
        if not (options.missing and done(record, what)):
            yield what, StepJob(case, text, *times)
    peers = [peer_job(case, text, *times) for text in expanded(options.peers, case.peers)]
    absent = [name for name in NEEDED_BY_PEERS if importlib.util.find_spec(name) is None]
    if peers and absent:
        return tell(f"no peers: {', '.join(absent)} not installed")
    for job in peers:
        what = peer_row(job)
        if not (options.missing and done(record, what)):
            yield what, job


def expanded(words: tuple[str, ...], everything: tuple[str, ...]) -> tuple[str, ...]:
    """The words, commas taken apart; "all" is everything, "none" nothing."""
    flat = [part for word in words for part in word.split(",") if part and part != "none"]
    return tuple(dict.fromkeys(w for word in flat for w in (everything if word == "all" else (word,))))


def done(record: Record, what: dict[str, Any]) -> bool:
    """Whether a row is there and did not fail."""
    row = record.find(what)
    return row is not None and "error" not in row


def begin_run(record: Record, case: Case) -> None:
    """Measures the matmul rate and notes where all this happens."""
    found = children.call(JAX, MatmulJob(case.config.compute.dtype), SECONDS)
    if "error" in found:
        raise InputError(f"the device cannot be used: {found['error']}")
    if case.config.compute.attention == "cudnn" and found["platform"] != "gpu":
        raise InputError("compute.attention cudnn needs an NVIDIA GPU, and there is none here; use xla")
    device = found.pop("device")
    if record.device not in ("", device):
        raise InputError(f"these figures are of another device ({record.device}), this is {device}")
    record.device = device
    record.runs.append(
        {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            **found,
            "command": " ".join(sys.argv[1:]),
        }
    )
    tell(f"{device}: {found['matmul_tflops']:.3g} TFLOP/s ({found['matmul_side']}-cube matmul)")


def check(record: Record, case: Case, methods: list[str]) -> None:
    """Raises InputError unless every path of every method agrees with its formula."""
    if not methods:
        return
    found = children.call(JAX, CheckJob(case, tuple(methods)), SECONDS)
    if "error" in found:
        raise InputError(f"the check of the paths failed: {found['error']}")
    if found["failures"]:
        more = f" (and {len(found['failures']) - 1} more)" if len(found["failures"]) > 1 else ""
        raise InputError(f"wrong results, nothing is timed: {found['failures'][0]}{more}")
    record.runs[-1]["check"] = found["worst"]
    worst = ", ".join(f"{name} {error:.1e}" for name, error in found["worst"].items())
    tell(f"{found['compared']} comparisons with the formula, largest relative errors: {worst or 'none'}")


def measure(
    record: Record, what: dict[str, Any], job: StepJob | PeerJob, peer_seconds: float, programs: str
) -> None:
    """One row, in a process of its own."""
    if isinstance(job, PeerJob):
        figures = children.call(TORCH, job, peer_seconds)
    else:
        figures = children.call(JAX, job, SECONDS, environment(job, programs))
    record.put(what, figures)
    tell(f"{label(what)}: {figures.get('error') or _figures(figures)}")


def environment(job: StepJob, programs: str) -> dict[str, str]:
    """The frozen base alone may find its program compiled: others' seconds of compilation are to be true."""
    if job.method != FROZEN:
        return children.ENVIRONMENT
    kept = {"JAX_COMPILATION_CACHE_DIR": programs, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return children.ENVIRONMENT | kept


def again(record: Record, work: list[Work], programs: str) -> None:
    """Measures the frozen base once more, to see whether the device has become faster or slower meanwhile."""
    for what, job in work:
        if isinstance(job, StepJob) and job.method == FROZEN and done(record, what):
            before = record.find(what) or {}
            after = children.call(JAX, job, SECONDS, environment(job, programs))
            if "error" not in after:
                record.runs[-1]["frozen_milliseconds"] = [before["milliseconds"], after["milliseconds"]]
                drift = after["milliseconds"] / before["milliseconds"] - 1
                tell(f"{label(what)} once more: {_figures(after)} (drift {drift:+.1%})")
                if abs(drift) > MOST_DRIFT:
                    tell("the device became faster or slower meanwhile: do not compare these rows")


def tell(sentence: str) -> None:
    """A line of progress."""
    print(sentence, flush=True)


def _figures(figures: dict[str, Any]) -> str:
    return f"{figures['milliseconds']:.2f} ms, {figures['tokens_per_second']:,.0f} tokens/s"
