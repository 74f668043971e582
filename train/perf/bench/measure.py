"""What one process of its own measures with JAX: the rate of matmuls, the check of paths, or one method."""

import importlib.metadata
import platform
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax.methods import Method
from train.perf.bench import children, flops
from train.perf.bench.cases import Case, with_method
from train.perf.bench.check import check
from train.perf.bench.jobs import CheckJob, MatmulJob, StepJob
from train.perf.bench.program import Program, compile_step
from train.perf.bench.spread import GIB, spread
from train.runtime import backend

MATMULS = 10  # one after another, between two looks at the clock
MATMUL_SECONDS = 2.0  # a device that has rested is faster than one at work
SIDE = {"gpu": 8192, "tpu": 8192}
SIDE_ELSEWHERE = 1024
CHECKED_TOKENS = 4096


def run(job: MatmulJob | CheckJob | StepJob) -> dict[str, Any]:
    """Does one job."""
    if isinstance(job, MatmulJob):
        return matmul_rate(job.dtype)
    if isinstance(job, CheckJob):
        return checked(job.case, job.methods)
    return step(job)


def matmul_rate(dtype: str) -> dict[str, Any]:
    """The sustained rate of a square product of random numbers, and where it was measured."""
    device = jax.devices()[0]
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
        "matmul_side": side,
        "matmul_tflops": 2 * side**3 / float(np.median(times)) / 1e12,
        "versions": {"python": platform.python_version(), **_versions("jax", "jaxlib", "flax", "optax")},
    }


def _versions(*packages: str) -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in packages}


def checked(case: Case, words: tuple[str, ...]) -> dict[str, Any]:
    """The largest error of each path and type, and a sentence for each that is too large."""
    backend.set_flags(case.config)
    methods = [with_method(case.config, word).method.method() for word in words]
    adapters = [method for method in methods if isinstance(method, Method)]
    tokens = min(CHECKED_TOKENS, case.config.tokens_per_step())
    found = check(case.config.model, adapters, tokens, case.base_dtype)
    worst: dict[str, float] = {}
    for finding in found:
        name = f"{finding.path} {finding.dtype}"
        worst[name] = max(worst.get(name, 0.0), finding.error)
    return {"worst": worst, "failures": [f.sentence() for f in found if not f.passes], "compared": len(found)}


def step(job: StepJob) -> dict[str, Any]:
    """Times one method's step: a row of the table."""
    config = with_method(job.case.config, job.method)
    program = compile_step(config, job.case.base_dtype)
    program.run(job.warmup)
    milliseconds = 1e3 * np.array(program.run(job.steps))
    if not np.isfinite(program.loss):
        raise FloatingPointError(f"the loss is {program.loss}")
    count = flops.needed(program.state.params, program.methods)
    tokens = config.tokens_per_step()
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
    """Peak of the device's memory as its allocator saw it, where it says, and as the compiler planned it."""
    plan = program.compiled.memory_analysis()
    planned = (
        plan.argument_size_in_bytes
        + plan.output_size_in_bytes
        - plan.alias_size_in_bytes
        + plan.temp_size_in_bytes
    )
    seen = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {"peak_gib": seen / GIB if seen else None, "planned_gib": planned / GIB}


if __name__ == "__main__":
    children.serve(run)
