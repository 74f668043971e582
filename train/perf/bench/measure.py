"""The measuring process for JAX: the rate of matmuls, the check of all paths, or the step of one method."""

import importlib.metadata
import math
import platform
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax import sharding
from train.perf.bench import children, flops, meshes
from train.perf.bench.check import check
from train.perf.bench.jobs import CheckJob, MatmulJob, ScalingJob, StepJob
from train.perf.bench.program import Program, compile_step
from train.perf.bench.spread import GIB, spread
from train.runtime import backend

MATMULS = 10  # one after another, between two readings of the clock
MATMUL_SECONDS = 2.0  # a device is faster after a rest than at work
SIDE = {"gpu": 8192, "tpu": 8192}
SIDE_ELSEWHERE = 1024
PACKAGES = ("jax", "jaxlib", "flax", "optax")


def run(job: MatmulJob | CheckJob | StepJob | ScalingJob) -> dict[str, Any] | Iterator[dict[str, Any]]:
    """Does one job and returns what it measured, row by row for the job of several rows."""
    if isinstance(job, MatmulJob):
        return matmul_rate(job.dtype)
    exact = job.step.deterministic if isinstance(job, ScalingJob) else job.deterministic
    backend.set_flags(exact)  # before JAX starts
    if isinstance(job, ScalingJob):
        return meshes.scaled(job)
    return checked(job) if isinstance(job, CheckJob) else step(job)


def matmul_rate(dtype: str) -> dict[str, Any]:
    """Returns the sustained rate of a square product of random numbers, the device and the versions."""
    device = jax.local_devices()[0]
    side = SIDE.get(device.platform, SIDE_ELSEWHERE)
    a, b = (jax.random.normal(jax.random.key(i), (side, side), jnp.dtype(dtype)) for i in range(2))
    product = jax.jit(jnp.matmul)

    def seconds() -> float:
        started = time.perf_counter()
        for _ in range(MATMULS):
            c = product(a, b)
        c.block_until_ready()
        return (time.perf_counter() - started) / MATMULS

    seconds()  # compiles
    times, started = [seconds()], time.perf_counter()
    while time.perf_counter() - started < MATMUL_SECONDS:
        times.append(seconds())
    times = times[len(times) // 2 :]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "matmul_side": side,
        "matmul_tflops": 2 * side**3 / float(np.median(times)) / 1e12,
        "versions": {"python": platform.python_version()}
        | {p: importlib.metadata.version(p) for p in PACKAGES},
    }


def checked(job: CheckJob) -> dict[str, Any]:
    """Returns the largest error of each path and dtype, and a sentence for each that is too large."""
    found = check(job.model, job.methods, job.tokens, job.base_dtype)
    worst: dict[str, float] = {}
    for finding in found:
        name = f"{finding.path} {finding.dtype}"
        worst[name] = max(worst.get(name, 0.0), finding.error)
    return {"worst": worst, "failures": [f.sentence() for f in found if not f.passes], "compared": len(found)}


def step(job: StepJob) -> dict[str, Any]:
    """Times one method's step, and returns a row of the table."""
    mesh = sharding.make_mesh(*job.mesh)
    if mesh.size > 1:
        return meshes.on_mesh(job)
    program = compile_step(job.spec, job.rules, job.batch, mesh)
    program.run(job.warmup)
    milliseconds = 1e3 * np.array(program.run(job.steps))
    if not np.isfinite(program.loss):
        raise FloatingPointError(f"the loss is {program.loss}")
    count = flops.needed(program.state.params, program.methods)
    tokens = math.prod(job.batch)
    return {
        **spread(milliseconds),
        "tokens_per_second": tokens / np.median(milliseconds) * 1e3,
        "needed_tflop": (count.base + count.adapters) * tokens / 1e12,
        "needed_tflop_base": count.base * tokens / 1e12,
        "compile_seconds": program.compile_seconds,
        **_memory(program),
        "loss": program.loss,
    }


def _memory(program: Program) -> dict[str, float | None]:
    """Returns peak memory as the device's allocator measured it, or None, and as the compiler planned it."""
    plan = program.compiled.memory_analysis()
    outputs = plan.output_size_in_bytes - plan.alias_size_in_bytes
    planned = plan.argument_size_in_bytes + outputs + plan.temp_size_in_bytes
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {"peak_gib": peak / GIB if peak else None, "planned_gib": planned / GIB}


if __name__ == "__main__":
    children.serve(run)
