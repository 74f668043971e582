"""Compiles a run's programs for devices that need not be present. No parameter is allocated."""

import contextlib
import dataclasses
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from mora_jax import sharding
from mora_jax.errors import InputError
from mora_jax.models.batch import Batch
from mora_jax.models.llama import Llama
from mora_jax.transform import Methods
from train.config.run import RunConfig
from train.data.rows.info import load_info
from train.perf.hlo import option
from train.perf.plan.flops import product_flops
from train.perf.plan.hlo import Collective, collectives
from train.runtime import backend
from train.step.spec import spec_of
from train.step.step import eval_step, orient_step, restart_step, train_step


@dataclasses.dataclass(frozen=True)
class Program:
    """What the compiler reports about one program. Bytes are those of one device.

    Attributes:
      name: name of the jitted function.
      arguments: bytes of its inputs.
      temporary: bytes besides inputs and outputs.
      peak: most bytes in use at a time, inputs included; for a program that does not fit, what it would need.
      refused: the compiler's message if the program does not fit; else empty.
      flops: operations of all matrix products, a device's share.
      collectives: what is sent.
      seconds: time of the compilation.
    """

    name: str
    arguments: int
    temporary: int
    peak: int
    refused: str
    flops: float
    collectives: list[Collective]
    seconds: float


def train_program(config: RunConfig, methods: Methods, state: Any, mesh: Mesh) -> Program:
    """Compiles the training step."""
    batch = _batch(config.batch_size, config, mesh)
    return _compiled(train_step, mesh, config, spec_of(config), methods, state, batch)


def restart_program(config: RunConfig, methods: Methods, state: Any, mesh: Mesh) -> Program:
    """Compiles the restart, which merges, re-initialises and clears optimizer state."""
    return _compiled(restart_step, mesh, config, spec_of(config), methods, state)


def orient_program(config: RunConfig, methods: Methods, state: Any, mesh: Mesh) -> Program:
    """Compiles what fits adapters to gradients, at the start and after restarts."""
    batch = _batch(config.batch_size, config, mesh)
    return _compiled(orient_step, mesh, config, spec_of(config), methods, state, batch)


def eval_program(config: RunConfig, methods: Methods, state: Any, mesh: Mesh) -> Program:
    """Compiles the evaluation of a batch."""
    rows = config.eval.batch_size
    batch = _batch(rows, config, mesh, weighted=True)
    model = Llama(config.model, config.compute)
    arrays = (state.params, state.adapters)
    return _compiled(eval_step, mesh, config, model, methods, *arrays, batch)


PROGRAMS = {
    "train": train_program,
    "orient": orient_program,
    "restart": restart_program,
    "eval": eval_program,
}
TRAINING = ("train", "orient")  # those that need the most memory


def names_of(config: RunConfig, methods: Methods) -> list[str]:
    """Returns the names of the programs that a run has."""
    lacks = set()
    if not any(methods.orientable()):
        lacks.add("orient")
    if not config.restart.every:
        lacks.add("restart")
    return [name for name in PROGRAMS if name not in lacks]


def _batch(rows: int, config: RunConfig, mesh: Mesh, weighted: bool = False) -> Batch:
    """Returns a batch of the run without values. If its data set is not here, rows are joined documents."""
    joined, data = True, config.data
    with contextlib.suppress(InputError, OSError):
        joined = load_info(data.directory, splits=()).joined

    def array(dtype: DTypeLike) -> Any:
        return jax.ShapeDtypeStruct((rows, data.sequence_length), dtype, sharding=sharding.batch(mesh))

    weights = array(jnp.float32) if weighted or not joined else None
    segments = array(jnp.int32) if data.document_mask or not joined else None
    return Batch(array(jnp.uint16), weights, segments)


def _compiled(function: Any, mesh: Mesh, config: RunConfig, *arguments: Any) -> Program:
    with jax.set_mesh(mesh):
        traced = function.trace(*arguments)
        lowered = traced.lower()
        began = time.perf_counter()
        try:
            compiled, refused = lowered.compile(compiler_options=_options(config, mesh)), ""
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            compiled, refused = None, str(error).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")
    memory: Any = compiled.memory_analysis() if compiled else None
    return Program(
        name=traced.fun_name,
        arguments=memory.argument_size_in_bytes if memory else 0,
        temporary=memory.temp_size_in_bytes if memory else 0,
        peak=_peak(memory, mesh) if memory else _needed(refused),
        refused=refused,
        flops=product_flops(traced.jaxpr) / mesh.size,
        collectives=collectives(compiled.as_text(), mesh.shape) if compiled else [],
        seconds=time.perf_counter() - began,
    )


def _options(config: RunConfig, mesh: Mesh) -> dict[str, str | bool]:
    """Returns the compiler's options.

    The GPU compiler gets those of a run, and chooses kernels without timing them, since there may be no GPU.
    The CPU compiler has no products of bfloat16, which GPUs have. It would convert the kernels of all layers
    to float32 before the loop over layers.
    """
    platform = mesh.devices.flat[0].platform
    if platform == "gpu":
        flags = backend.flags(config.deterministic)
        return dict(map(option, flags)) | {"xla_gpu_autotune_level": "0"}
    if platform != "cpu" or config.base_dtype == "float32":
        return {}
    passes = ("while-loop-invariant-code-motion", "while-loop-expensive-invariant-code-motion")
    return {"xla_disable_hlo_passes": ",".join(passes)}


def _peak(memory: Any, mesh: Mesh) -> int:
    if mesh.devices.flat[0].platform == "tpu":
        return memory.peak_memory_in_bytes
    # The other compilers' own figure leaves temporaries out.
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + outputs + memory.temp_size_in_bytes


def _needed(message: str) -> int:
    """Returns the bytes that a program would need, from the compiler's message; 0 if it gives none."""
    size = re.search(r"(?:Used |temporaries \()([\d.]+)([KMG])", message)
    return round(float(size[1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[size[2]]) if size else 0
