"""Times a step on meshes of devices, beside the same step on one device."""

import concurrent.futures
import dataclasses
import functools
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

from mora_jax import sharding
from mora_jax.errors import InputError
from train.perf.bench import children, communication, flops
from train.perf.bench.jobs import Placement, ScalingJob, StepJob
from train.perf.bench.program import Lowered, Program, compiled, lower_step, placed
from train.perf.bench.spread import GIB, spread
from train.runtime.memory import exhausted

ROUNDS = 4  # a mesh and one device take turns, so that a device that slows down slows both
ONE_DEVICE = Placement((1, 1, 1), 0)

Row: TypeAlias = dict[str, Any]
# A row, and the program on one device if it is to take turns with meshes.
Measured: TypeAlias = tuple[Row, Program | None]
# A compiled step with the seconds that it took, or why there is none.
Compiled: TypeAlias = tuple[Lowered, Any, float] | str


class NotCompiled(RuntimeError):
    """A step that was not compiled; the text says why."""


def on_mesh(job: StepJob) -> Row:
    """Times the step of a job on its mesh of several devices, and returns a row of the table.

    One device takes the sequences that one shard of the batch has.
    """
    mesh = sharding.make_mesh(*job.mesh)
    sizes, rows = tuple(mesh.shape.values()), job.batch[0]
    shards = sharding.batch_shards(mesh)
    if rows % shards:
        raise InputError(f"a batch of {rows} does not divide among {shards} shards of a mesh")
    alone = dataclasses.replace(job, mesh=ONE_DEVICE.mesh, batch=(rows // shards, job.batch[1]))
    one, row = scaled(ScalingJob(alone, (Placement(sizes, rows),)))
    if "error" in row:
        raise NotCompiled(row["error"])
    return row | {"one_device": one}


def scaled(job: ScalingJob) -> Iterator[Row]:
    """Yields the row of one device if it is measured, and then of each mesh, in order.

    A row that fails has "error" in the place of figures.
    """
    step = job.step
    alone = dataclasses.replace(ONE_DEVICE, batch=step.batch[0])
    placements = ((alone,) if job.baseline else ()) + job.placements
    programs = compile_all(step, placements, job.compilers)
    one: Program | None = None
    before: Row | None = None
    for i, (placement, program) in enumerate(zip(placements, programs, strict=True)):
        if job.baseline and i == 0:
            row, one = attempt(first, step, program)
            before = None if "error" in row else row
        else:
            row, _ = attempt(beside, step, placement, program, one, before)
            if one and row.get("out_of_memory"):  # the state of one device beside it may be too much
                one = None
                row, _ = attempt(beside, step, placement, program, None, before)
        yield row


def attempt(measure: Callable[..., Measured], *arguments: Any) -> Measured:
    """Returns what a measurement returns, or a row with "error" if memory ran out or XLA failed."""
    gc.collect()
    try:
        return measure(*arguments)
    except (jax.errors.JaxRuntimeError, FloatingPointError, InputError, RuntimeError, ValueError) as error:
        line = str(error) if isinstance(error, NotCompiled) else children.one_line(error)
        return {"error": line} | ({"out_of_memory": True} if exhausted(error) else {}), None


def compile_all(step: StepJob, placements: Sequence[Placement], compilers: int) -> Iterator[Compiled]:
    """Yields the compiled step for each placement; a sentence in the place of one that failed.

    One compiler compiles each when it is asked for, several compile all of them before the first is yielded.
    """
    lowered = functools.cache(functools.partial(_lowered, step))

    def one(placement: Placement) -> Compiled:
        found = lowered(placement.mesh, placement.batch)
        if isinstance(found, str):
            return found
        try:
            # As options of one program, so that one device beside it is compiled without them.
            return found, *compiled(found, placement.flags)
        except (jax.errors.JaxRuntimeError, InputError) as error:
            return children.one_line(error)

    if compilers == 1:
        yield from map(one, placements)
        return
    for placement in placements:  # traced one after another, in this thread
        lowered(placement.mesh, placement.batch)
    with concurrent.futures.ThreadPoolExecutor(compilers) as pool:
        yield from list(pool.map(one, placements))


def _lowered(step: StepJob, sizes: tuple[int, int, int], rows: int) -> Lowered | str:
    data, fsdp, tensor = sizes
    alone = data * fsdp * tensor == 1
    try:  # of several processes, each measures one device of its own
        mesh = sharding.make_mesh(data, fsdp, tensor, jax.local_devices() if alone else None)
        return lower_step(step.spec, step.rules, (rows, step.batch[1]), mesh)
    except InputError as error:
        return children.one_line(error)


def first(step: StepJob, program: Compiled) -> Measured:
    """Times the step on one device. Returns its row, and the program to take turns with meshes."""
    one = started(step, program)
    one.run(step.warmup)
    milliseconds = timed(one, step.steps)
    row = figures(step, ONE_DEVICE, one, milliseconds)
    if found := communication.profiled(one, step.profiled):
        row["timeline"] = dataclasses.asdict(found)
    return row, one


def beside(
    step: StepJob, placement: Placement, program: Compiled, one: Program | None, before: Row | None
) -> Measured:
    """Times the step on a mesh, taking turns with one device.

    Args:
      step: the step.
      placement: the mesh.
      program: the step compiled for it.
      one: the step on one device; None if its state does not fit beside the mesh's.
      before: row of one device, measured earlier; None if it was not measured.
    """
    wide = started(step, program)
    wide.run(step.warmup)
    turns = -(-step.steps // ROUNDS)
    milliseconds: list[float] = []
    alone: list[float] = []
    for _ in range(ROUNDS if one else 1):
        milliseconds += timed(wide, turns if one else step.steps)
        alone += timed(one, turns) if one else []
    row = figures(step, placement, wide, milliseconds)
    reference = float(np.median(alone)) if alone else before["milliseconds"] if before else None
    if reference:
        rate = math.prod(step.batch) / reference * 1e3
        row |= {"one_device_milliseconds": reference, "speedup": row["tokens_per_second"] / rate}
    if (found := communication.sent(wide.compiled.as_text(), wide.mesh.shape)) is not None:
        row["sent"] = communication.by_kind(found)
        row["collectives"] = [dataclasses.asdict(collective) for collective in found]
    if seen := communication.profiled(wide, step.profiled):
        row["timeline"] = dataclasses.asdict(seen)
    return row, None


def started(step: StepJob, program: Compiled) -> Program:
    """Returns a compiled step with its state. Raises NotCompiled if there is none."""
    if isinstance(program, str):
        raise NotCompiled(program)
    return placed(*program)


def timed(program: Program, steps: int) -> list[float]:
    """Returns the milliseconds of steps, without two before them.

    Nothing precedes the first. If the host was late to see its end, the second seems too short.
    """
    return [1e3 * seconds for seconds in program.run(steps + 2)[2:]]


def figures(step: StepJob, placement: Placement, program: Program, milliseconds: Sequence[float]) -> Row:
    """Returns the figures of a row that every mesh has. Raises FloatingPointError for a loss like NaN."""
    if not np.isfinite(program.loss):
        raise FloatingPointError(f"the loss is {program.loss}")
    count = flops.needed(program.state.params, program.methods)
    tokens = (placement.batch or step.batch[0]) * step.batch[1]
    plan, devices = program.compiled.memory_analysis(), program.mesh.size
    outputs = plan.output_size_in_bytes - plan.alias_size_in_bytes
    planned = plan.argument_size_in_bytes + outputs + plan.temp_size_in_bytes
    rate = tokens / float(np.median(milliseconds)) * 1e3
    return {
        **spread(np.asarray(milliseconds)),
        "mesh": dict(program.mesh.shape),
        "devices": devices,
        "batch": tokens // step.batch[1],
        "tokens_per_second": rate,
        "tokens_per_second_device": rate / devices,
        "needed_tflop": (count.base + count.adapters) * tokens / 1e12,
        "needed_tflop_base": count.base * tokens / 1e12,
        "compile_seconds": program.compile_seconds,
        "peak_gib": None,  # of the process, which holds several programs
        "planned_gib": planned / GIB,
        "loss": program.loss,
    }
