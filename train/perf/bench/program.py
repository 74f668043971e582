"""A compiled training step with its state and batches on the device, to be timed or profiled."""

import collections
import dataclasses
import itertools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from mora_jax import sharding, transform, trees
from mora_jax.errors import InputError
from mora_jax.models.batch import Batch
from mora_jax.models.llama import STACKED, abstract_params
from mora_jax.transform import Methods
from train.step.spec import StepSpec
from train.step.state import TrainState, held_types, init_params, init_state, state_over
from train.step.step import train_step

NO_CUDNN = "--compute.attention cudnn needs an NVIDIA GPU, and this machine has none; use xla"
BATCHES = 4  # different batches, used in turn


@dataclasses.dataclass
class Program:
    """`train.step.step.train_step`, compiled.

    Attributes:
      compiled: the step, a function of a state and a batch.
      methods: the method of each parameter.
      state: the current state, which every step donates and replaces.
      batches: random tokens on the device.
      compile_seconds: time of tracing and compiling.
      loss: loss of the last step.
    """

    compiled: Any
    methods: Methods
    state: TrainState
    batches: list[Batch]
    compile_seconds: float
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


def compile_step(spec: StepSpec, rules: transform.Rules, batch: tuple[int, int]) -> Program:
    """Compiles the step for the first device, with random parameters and tokens.

    Args:
      spec: what the step computes.
      rules: regexes of parameters and their methods.
      batch: sequences and tokens of a batch.

    Raises:
      InputError: for rules that do not fit the model, or an attention that needs another device.
    """
    if spec.compute.attention == "cudnn" and jax.devices()[0].platform != "gpu":
        raise InputError(NO_CUDNN)
    methods = transform.assign(rules, abstract_params(spec.model), STACKED)
    state = random_state(spec, methods)
    batches = random_batches(spec, batch)
    started = time.perf_counter()
    with jax.set_mesh(sharding.make_mesh(1)):  # as in a run; methods see the kind of the device
        compiled = train_step.lower(spec, methods, state, batches[0]).compile()
    return Program(compiled, methods, state, batches, time.perf_counter() - started)


def random_state(spec: StepSpec, methods: Methods) -> TrainState:
    """Returns the state before the first update. A bfloat16 base is never held in float32."""
    if spec.base_dtype == "float32":
        return jax.jit(lambda: init_state(spec, methods, init_params(spec)))()
    return state_over(spec, methods, random_params(spec, methods))


def random_params(spec: StepSpec, methods: Methods) -> Any:
    """Returns random parameters. They are drawn layer by layer in their types, which takes little memory."""
    types = held_types(spec, methods)
    shapes = trees.flatten(abstract_params(spec.model))
    keys = jax.random.split(jax.random.key(spec.seed), len(shapes))
    std = spec.model.initializer_range

    def draw(key: PRNGKeyArray, path: str, shape: tuple[int, ...]) -> Array:
        dtype = types[path]
        if path.endswith("scale"):
            return jnp.ones(shape, dtype)
        return jax.lax.map(
            lambda k: jax.random.normal(k, shape[1:], dtype) * std, jax.random.split(key, shape[0])
        )

    drawn = jax.jit(draw, static_argnums=(1, 2))
    return trees.unflatten(
        {path: drawn(key, path, leaf.shape) for key, (path, leaf) in zip(keys, shapes.items(), strict=True)}
    )


def random_batches(spec: StepSpec, shape: tuple[int, int]) -> list[Batch]:
    """Returns random token batches on the device."""
    draw: Callable[[Any], Array] = jax.jit(
        lambda key: jax.random.randint(key, shape, 0, spec.model.vocab_size, jnp.int32)
    )
    return [Batch(draw(key)) for key in jax.random.split(jax.random.key(spec.seed), BATCHES)]
