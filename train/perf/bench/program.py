"""A compiled training step with its state and batches on the device, to be timed or profiled."""

import collections
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PRNGKeyArray

from mora_jax import sharding, transform, trees
from mora_jax.errors import InputError
from mora_jax.models.batch import Batch
from mora_jax.models.llama import STACKED, abstract_params
from mora_jax.transform import Methods
from train.perf.hlo import option
from train.step.spec import StepSpec
from train.step.state import TrainState, held_types, init_params, init_state, layouts, state_over
from train.step.step import train_step

NO_CUDNN = "--compute.attention cudnn needs an NVIDIA GPU, and this machine has none; use xla"
BATCHES = 4  # different batches, used in turn


@dataclasses.dataclass(frozen=True)
class Lowered:
    """`train.step.step.train_step`, lowered for a mesh.

    Attributes:
      spec: what the step computes.
      methods: the method of each parameter.
      batch: sequences and tokens of a batch, of all devices together.
      mesh: the devices.
      fresh: makes a random state and random batches; compiled with its first call.
      lowered: what is left to compile.
      seconds: time of tracing and lowering.
    """

    spec: StepSpec
    methods: Methods
    batch: tuple[int, int]
    mesh: Mesh
    fresh: Callable[[], tuple[TrainState, list[Batch]]]
    lowered: Any
    seconds: float


@dataclasses.dataclass
class Program:
    """`train.step.step.train_step`, compiled.

    Attributes:
      compiled: the step, a function of a state and a batch.
      methods: the method of each parameter.
      state: the current state, which every step donates and replaces.
      batches: random tokens on the device.
      compile_seconds: time of tracing and compiling.
      mesh: the devices.
      loss: loss of the last step.
    """

    compiled: Any
    methods: Methods
    state: TrainState
    batches: list[Batch]
    compile_seconds: float
    mesh: Mesh
    loss: float = float("nan")

    def run(self, steps: int) -> list[float]:
        """Runs steps as the training loop does: on an accelerator, the next starts before the last has ended.

        Returns:
          For each step the seconds from the end of the previous one to its own.
        """
        in_flight = 1 if jax.devices()[0].platform == "cpu" else 2
        ends, waiting = [time.perf_counter()], collections.deque[Array]()
        for i in range(steps):
            self.state, scalars = self.compiled(self.state, self.batches[i % len(self.batches)])
            waiting.append(scalars["loss"])
            while len(waiting) == in_flight or (waiting and i == steps - 1):
                self.loss = float(waiting.popleft())
                ends.append(time.perf_counter())
        return [end - start for start, end in itertools.pairwise(ends)]


def lower_step(spec: StepSpec, rules: transform.Rules, batch: tuple[int, int], mesh: Mesh) -> Lowered:
    """Lowers the step for a mesh, with the state laid out as `mora pretrain` does. Allocates nothing.

    Args:
      spec: what the step computes.
      rules: regexes of parameters and their methods.
      batch: sequences and tokens of a batch, of all devices together.
      mesh: the devices.

    Raises:
      InputError: for rules that do not fit the model, an attention that needs another device, or a batch
        that does not divide among the devices.
    """
    if spec.compute.attention == "cudnn" and mesh.devices.flat[0].platform != "gpu":
        raise InputError(NO_CUDNN)
    rows, shards = batch[0], sharding.batch_shards(mesh)
    if rows % (shards * spec.microbatches):
        raise InputError(f"a batch of {rows} does not divide among {shards} shards of a mesh")
    started = time.perf_counter()
    methods = transform.assign(rules, abstract_params(spec.model), STACKED)
    shapes = jax.eval_shape(lambda: init_state(spec, methods, init_params(spec)))
    places = sharding.shardings(shapes, mesh, layouts(methods))
    state = jax.tree.map(lambda a, at: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=at), shapes, places)
    tokens: Any = jax.ShapeDtypeStruct(batch, jnp.int32, sharding=sharding.batch(mesh))
    with jax.set_mesh(mesh):  # as in a run; methods see the kind of the device
        lowered = train_step.lower(spec, methods, state, Batch(tokens))
    state_of, batches_of = random_state(spec, methods, places), random_batches(spec, batch, mesh)
    seconds = time.perf_counter() - started
    return Lowered(spec, methods, batch, mesh, lambda: (state_of(), batches_of()), lowered, seconds)


def compile_step(
    spec: StepSpec,
    rules: transform.Rules,
    batch: tuple[int, int],
    mesh: Mesh | None = None,
    flags: Sequence[str] = (),
) -> Program:
    """Compiles the step, by default for the first device, with random parameters and tokens.

    Args:
      spec: what the step computes.
      rules: regexes of parameters and their methods.
      batch: sequences and tokens of a batch, of all devices together.
      mesh: the devices.
      flags: options of XLA as NAME=VALUE.

    Raises:
      InputError: as `lower_step` and `compiled`.
    """
    lowered = lower_step(spec, rules, batch, sharding.make_mesh(1) if mesh is None else mesh)
    return placed(lowered, *compiled(lowered, flags))


def compiled(lowered: Lowered, flags: Sequence[str] = ()) -> tuple[Any, float]:
    """Returns the compiled step and the seconds that tracing and compiling took.

    Raises:
      InputError: for a flag that XLA does not know, or a value that it does not take.
    """
    options = dict(map(option, flags))
    started = time.perf_counter()
    try:
        step = lowered.lowered.compile(compiler_options=options or None)
    except jax.errors.JaxRuntimeError as error:
        if any(sentence in str(error) for sentence in ("No such compile option", "While setting option")):
            raise InputError(str(error).splitlines()[0]) from error
        raise
    return step, lowered.seconds + time.perf_counter() - started


def placed(lowered: Lowered, step: Any, seconds: float) -> Program:
    """Returns the program with a random state and random batches on its devices."""
    state, batches = lowered.fresh()
    return Program(step, lowered.methods, state, batches, seconds, lowered.mesh)


def random_state(spec: StepSpec, methods: Methods, places: TrainState) -> Callable[[], TrainState]:
    """Returns a function that makes the state before the first update.

    No device makes more than its part of the state. A bfloat16 base is never held in float32.
    """
    if spec.base_dtype == "float32":
        return jax.jit(lambda: init_state(spec, methods, init_params(spec)), out_shardings=places)
    params = random_params(spec, methods, places.params)
    return lambda: state_over(spec, methods, params(), places)


def random_params(spec: StepSpec, methods: Methods, places: Any) -> Callable[[], Any]:
    """Returns a function that draws parameters layer by layer in their types, which takes little memory."""
    types = held_types(spec, methods)
    shapes, at = trees.flatten(abstract_params(spec.model)), trees.flatten(places)
    std = spec.model.initializer_range

    def draw(i: int, shape: tuple[int, ...], dtype: np.dtype, constant: bool) -> Array:
        if constant:
            return jnp.ones(shape, dtype)
        keys = jax.random.split(_key(spec, i), shape[0])
        return jax.lax.map(lambda key: jax.random.normal(key, shape[1:], dtype) * std, keys)

    drawn = {
        path: jax.jit(
            functools.partial(draw, i, leaf.shape, types[path], path.endswith("scale")),
            out_shardings=at[path],
        )
        for i, (path, leaf) in enumerate(shapes.items())
    }
    return lambda: trees.unflatten({path: make() for path, make in drawn.items()})


def random_batches(spec: StepSpec, shape: tuple[int, int], mesh: Mesh) -> Callable[[], list[Batch]]:
    """Returns a function that draws token batches, sharded as those of a run."""
    draw: Callable[[Any], Array] = jax.jit(
        lambda i: jax.random.randint(_key(spec, i), shape, 0, spec.model.vocab_size, jnp.int32),
        out_shardings=sharding.batch(mesh),
    )
    # The numbers are NumPy's, which all processes have alike.
    return lambda: [Batch(draw(np.int32(i))) for i in range(BATCHES)]


def _key(spec: StepSpec, i: int | Array) -> PRNGKeyArray:
    return jax.random.fold_in(jax.random.key(spec.seed), i)
