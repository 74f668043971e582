"""The state of a run, how it starts, and how it lies on a mesh."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Int

from mora_jax import sharding, transform, trees
from mora_jax.models import llama
from mora_jax.models.llama import Compute, Llama
from mora_jax.transform import Methods
from train.step import optim, spikes
from train.step.spec import StepSpec

# Purposes of random numbers; each has a key of its own.
STREAMS = ("params", "adapters", "pruning", "dropout", "bases")

# Earlier versions had these alone, and their checkpoints resume.
_CHECKED = 4


@struct.dataclass
class TrainState:
    """Arrays only. `Methods`, which is passed beside the state, says what they mean.

    Attributes:
      step: updates done.
      params: the model's parameters: float32, and those that are not trained in `StepSpec.base_dtype`.
      adapters: the adapters' arrays, float32.
      opt_state: optimizer state of the trainable leaves.
      spikes: recent losses and gradient norms, by which bad steps are detected.
    """

    step: Int[Array, ""]
    params: Any
    adapters: Any
    opt_state: Any
    spikes: spikes.History


def init_params(spec: StepSpec) -> Any:
    """Returns random parameters of the model, float32, equal for equal seeds."""
    tokens_BT = jnp.zeros((1, 2), jnp.int32)
    # The parameters do not depend on how the model is computed, and its attention kernel may not be here.
    return Llama(spec.model, Compute(layers="scan")).init(key_of(spec, "params"), tokens_BT)["params"]


def init_state(spec: StepSpec, methods: Methods, params: Any) -> TrainState:
    """Returns the state before the first update, on top of the given parameters, in the types of `held`."""
    params = held(spec, methods, params)
    adapters = transform.attach(key_of(spec, "adapters"), params, methods)
    trainable, _ = transform.partition(params, adapters, methods)
    options = optim.array_options(spec.optimizer, methods)
    opt_state = optim.optimizer(spec.optimizer, options, layouts(methods)).init(trainable)
    return TrainState(jnp.zeros((), jnp.int32), params, adapters, opt_state, spikes.init(spec.bad_steps))


def state_over(spec: StepSpec, methods: Methods, params: Any, places: TrainState | None = None) -> TrainState:
    """Returns `init_state` of parameters that lie on the devices and are in the types of `held`.

    They become part of the state without a copy: the first update donates them.

    Args:
      spec: what the steps depend on.
      methods: what is done with each parameter.
      params: the parameters.
      places: shardings of the state; by default all of it lies on one device.
    """

    def rest(params: Any) -> TrainState:
        return dataclasses.replace(init_state(spec, methods, params), params=None)

    beside = dataclasses.replace(places, params=None) if places else None
    state = jax.jit(rest, out_shardings=beside)(params)
    return dataclasses.replace(state, params=params)


def held(spec: StepSpec, methods: Methods, params: Any) -> Any:
    """Returns parameters in the types that a state holds them in: those not trained in `base_dtype`."""
    types = held_types(spec, methods)
    return trees.replaced(params, {path: a.astype(types[path]) for path, a in trees.flatten(params).items()})


def held_types(spec: StepSpec, methods: Methods) -> dict[str, np.dtype]:
    """Returns the type of each parameter of a state, by path."""
    trained = methods.trained()
    return {path: jnp.dtype("float32" if path in trained else spec.base_dtype) for path, _ in methods.choices}


def layouts(methods: Methods) -> sharding.Rules:
    """Returns how the arrays of a state may be divided over a mesh; each owner of arrays brings its rules."""
    return (*methods.layouts(), *llama.LAYOUTS, *spikes.LAYOUTS)


def random_state(spec: StepSpec, step: int) -> dict[str, list[int]]:
    """Returns the next random numbers of the checked streams at a step.

    A checkpoint compares them: equal keys may give other numbers under another version or option of JAX.
    """
    keys = {stream: jax.random.fold_in(key_of(spec, stream), step) for stream in STREAMS[:_CHECKED]}
    return {stream: jax.random.bits(key, (4,)).tolist() for stream, key in keys.items()}


def key_of(spec: StepSpec, stream: str) -> Array:
    """Returns the random key of one of `STREAMS`."""
    return jax.random.fold_in(jax.random.key(spec.seed), STREAMS.index(stream))
