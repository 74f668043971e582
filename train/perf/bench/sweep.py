"""`mora bench sweep`: time and memory of a step by batch, sequence length, rank and width."""

import dataclasses
import time
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from mora_jax.errors import InputError
from mora_jax.methods.registry import from_json, to_flat
from train.config.run import RunConfig
from train.perf.bench import children
from train.perf.bench.cases import Case
from train.perf.bench.jobs import StepJob, step_job
from train.perf.bench.options import BenchSweep
from train.perf.bench.record import Record, label, method_row, start
from train.perf.bench.step import JAX, SECONDS, begin_run, done, expanded, progress
from train.perf.bench.sweep_plot import memory, plot

# Multiples of the case's own value on each axis.
FACTORS = {
    "batch": (Fraction(1, 8), Fraction(1, 4), Fraction(1, 2), Fraction(1)),
    "sequence": (Fraction(1, 4), Fraction(1, 2), Fraction(1), Fraction(2)),
    "rank": (Fraction(1, 16), Fraction(1, 4), Fraction(1), Fraction(2)),
    "width": (Fraction(1, 2), Fraction(1), Fraction(3, 2), Fraction(2)),
}


def bench(case: Case, options: BenchSweep) -> Record:
    """Measures the points that the file lacks, and draws the picture. The file is written after each point.

    Raises:
      InputError: for bad words, a size that cannot be scaled, or a device that cannot be used.
    """
    began, longest = time.monotonic(), 0.0
    record = start(case, options.out)
    missing = [(what, job) for what, job in points(case, options) if not done(record, what)]
    if missing:
        begin_run(record, case, children.call)
    for what, job in missing:
        spent = time.monotonic() - began
        if options.minutes and spent + longest > 60 * options.minutes:
            progress(f"{options.minutes:g} minutes are over; the same command resumes from here")
            break
        figures = children.call(JAX, job, SECONDS)
        record.put(what, figures)
        record.save(options.out)
        longest = max(longest, time.monotonic() - began - spent)
        result = figures.get("error") or f"{figures['milliseconds']:.2f} ms, {memory(figures):.2f} GiB"
        progress(f"{describe(what)}: {result}")
    if options.picture:
        plot(record, options.picture)
    return record


def points(case: Case, options: BenchSweep) -> Iterator[tuple[dict[str, Any], StepJob]]:
    """Yields every point once, as its key and its job.

    Raises:
      InputError: for bad words, and sizes that do not divide.
    """
    seen: list[dict[str, Any]] = []
    for axis in options.axes:
        for factor in FACTORS[axis]:
            scaled_case = dataclasses.replace(case, config=scaled(case.config, axis, factor))
            for text in expanded(options.methods, case.methods):
                what = point(scaled_case, text)
                if what not in seen:
                    seen.append(what)
                    yield what, step_job(scaled_case, text, options.warmup_steps, options.timed_steps)


def point(case: Case, text: str) -> dict[str, Any]:
    """Returns the key of a point: the method and the place on the axes."""
    c = case.config
    place = {"batch": c.batch_size, "sequence": c.data.sequence_length, "width": c.model.hidden_size}
    return method_row(case, text) | place


def describe(what: dict[str, Any]) -> str:
    """Returns the readable name of a point."""
    return f"{label(what)}, batch {what['batch']} x {what['sequence']}, width {what['width']}"


def scaled(config: RunConfig, axis: str, factor: Fraction) -> RunConfig:
    """Returns the config with one of its sizes multiplied. Raises InputError if the product is no integer."""
    if axis == "batch":
        return dataclasses.replace(config, batch_size=_times("--batch-size", config.batch_size, factor))
    if axis == "rank":
        rank = getattr(config.method, "rank", None)
        if rank is None or isinstance(config.method, str):
            raise InputError("--axes rank needs a method that has a rank")
        method = to_flat(config.method) | {"rank": _times("--method.rank", rank, factor)}
        return dataclasses.replace(config, method=from_json(method))
    if axis == "sequence":
        length = _times("--data.sequence-length", config.data.sequence_length, factor)
        longest = max(length, config.model.max_position_embeddings)
        return dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, sequence_length=length),
            model=dataclasses.replace(config.model, max_position_embeddings=longest),
        )
    # The width of a head stays, their number changes.
    names = ("hidden_size", "num_attention_heads", "num_key_value_heads")
    sizes = {
        name: _times(f"--model.{name.replace('_', '-')}", getattr(config.model, name), factor)
        for name in names
    }
    sizes["intermediate_size"] = int(config.model.intermediate_size * factor)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **sizes))


def _times(name: str, size: int, factor: Fraction) -> int:
    product = size * factor
    if product.denominator != 1:
        raise InputError(f"{name} {size} times {factor} is not an integer; choose another {name}")
    return int(product)
