"""`mora bench scaling`: a step on meshes of several devices beside one device."""

import contextlib
import dataclasses
import re
import time
from collections.abc import Sequence
from typing import Any

from mora_jax.errors import InputError
from mora_jax.sharding import AXES
from train.perf.bench import children, report
from train.perf.bench.cases import ONE_DEVICE, Case
from train.perf.bench.jobs import Placement, ScalingJob, StepJob, step_job
from train.perf.bench.options import BenchScaling
from train.perf.bench.record import Record, label, method_row, start
from train.perf.bench.scaling_plot import plot
from train.perf.bench.scaling_table import ALONE, mesh_name
from train.perf.bench.step import JAX, begin_run, expanded, progress

Sizes = tuple[int, int, int]
# One row: its key and where it is computed; None for one device.
Work = tuple[dict[str, Any], Placement | None]
_PART = re.compile(rf"({'|'.join(AXES)}):(\d+)")


def bench(case: Case, options: BenchScaling) -> Record:
    """Measures every method on every mesh, prints the table and draws the picture.

    The file is written after each row.

    Raises:
      InputError: for bad words, a mesh that the devices do not fill, or a device that cannot be used.
    """
    began = time.monotonic()
    given = None if "all" in options.meshes else parsed(options.meshes)  # bad words are found at once
    sets = flag_sets(options.flags)
    case = dataclasses.replace(case, config=dataclasses.replace(case.config, mesh=ONE_DEVICE))
    record = start(case, options.out)
    jobs = {
        text: step_job(case, text, options.warmup_steps, options.timed_steps, options.profiled_steps)
        for text in expanded(options.methods, case.methods)
    }
    begin_run(record, case, children.call)
    meshes = all_meshes(options.devices or record.runs[-1].get("devices", 1)) if given is None else given
    for text, job in jobs.items():
        work = planned(case, text, meshes, sets, not options.no_baseline)
        if not measured(record, job, work, options, began):
            break
    report.show(record)
    if options.picture:
        plot(record, options.picture)
    return record


def measured(record: Record, job: StepJob, work: list[Work], options: BenchScaling, began: float) -> bool:
    """Measures the rows of one method and puts them into the record.

    One process measures all of them. If it dies, the row that it measured has failed, and another process
    measures one device again and what is left; without one device, if that is what failed.

    Returns:
      Whether there was time for all rows.
    """
    longest, left, baseline = 0.0, work, not options.no_baseline
    while left:
        placements = tuple(placement for _, placement in left if placement)
        todo = ScalingJob(job, placements, baseline, options.compilers)
        again = baseline and left[0][1] is not None  # one device has its row
        rows = children.stream(JAX, todo, options.row_timeout, children.MEMORY_OF_MESHES)
        since = time.monotonic()
        with contextlib.closing(rows):
            for i, figures in enumerate(rows):
                if again and i == 0:
                    baseline = "error" not in figures
                    continue
                what, left = left[0][0], left[1:]
                record.put(what, figures)
                record.save(options.out)
                progress(f"{label(what)}, {what['mesh']}: {figures.get('error') or _figures(figures)}")
                now = time.monotonic()
                longest = max(longest, now - since) if i else longest  # the first one compiles them all
                since = now
                if options.minutes and left and now - began + longest > 60 * options.minutes:
                    progress(f"{options.minutes:g} minutes are over: {len(left)} rows were not measured")
                    return False
                if not left:
                    break
    return True


def planned(
    case: Case, text: str, meshes: Sequence[Sizes], sets: Sequence[tuple[str, ...]], baseline: bool
) -> list[Work]:
    """Returns the rows of one method, in order."""
    what, rows = method_row(case, text), case.config.batch_size
    found: list[Work] = [(what | {"mesh": ALONE}, None)] if baseline else []
    for mesh in meshes:
        for flags in sets:
            data, fsdp, _ = mesh
            key = what | {"mesh": mesh_name(dict(zip(AXES, mesh, strict=True)))}
            key |= {"flags": " ".join(flags)} if flags else {}
            found.append((key, Placement(mesh, rows * data * fsdp, flags)))
    return found


def parsed(words: Sequence[str]) -> list[Sizes]:
    """Returns the meshes of words such as data:2+fsdp:2, which commas may join.

    Raises:
      InputError: for a word of another form, or a mesh of one device.
    """
    return [_mesh(word) for word in expanded(tuple(words), ())]


def _mesh(word: str) -> Sizes:
    matches = [_PART.fullmatch(part) for part in word.split("+")]
    sizes = {match[1]: int(match[2]) for match in matches if match}
    if len(sizes) < len(matches) or max(sizes.values()) < 2 or min(sizes.values()) < 1:
        raise InputError(
            f"{word!r} is no mesh of several devices: give AXIS:SIZE[+AXIS:SIZE], as data:2+fsdp:2"
        )
    return sizes.get("data", 1), sizes.get("fsdp", 1), sizes.get("tensor", 1)


def all_meshes(devices: int) -> list[Sizes]:
    """Returns data, fsdp and tensor of each power of two up to a number of devices, and data with fsdp."""
    found: list[Sizes] = []
    size = 2
    while size <= devices:
        found += [(size, 1, 1), (1, size, 1), (1, 1, size)]
        found += [(2, size // 2, 1)] if size > 2 else []
        size *= 2
    if not found:
        raise InputError("scaling needs several devices, and one is here")
    return found


def flag_sets(words: Sequence[str]) -> list[tuple[str, ...]]:
    """Returns the sets of flags that words stand for; "none" is the empty set."""
    return list(dict.fromkeys(() if word == "none" else tuple(word.split(",")) for word in words))


def _figures(figures: dict[str, Any]) -> str:
    speedup = f", {figures['speedup']:.2f} times one device" if "speedup" in figures else ""
    rate = f"{figures['milliseconds']:.2f} ms, {figures['tokens_per_second']:,.0f} tokens/s"
    timeline = figures.get("timeline")
    exposed = f", {timeline['exposed']:.2f} ms of communication exposed" if timeline else ""
    return f"{rate}{speedup}{exposed}"
