"""The state of a run and the pure functions that move it: one update, one restart, one evaluation batch."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mora_jax import sharding, transform, trees
from mora_jax.models.llama import Compute, Llama
from mora_jax.transform import Methods
from train.config.run import RunConfig
from train.step import optim, spikes

Metrics = dict[str, Array]

# What random numbers are drawn for; each has a key of its own.
STREAMS = ("params", "adapters", "pruning", "dropout")


@struct.dataclass
class TrainState:
    """Arrays only; what they mean is said by `Methods`, which travels beside it.

    Attributes:
      step: updates done.
      params: the model's parameters, float32.
      adapters: the adapters' arrays, float32.
      opt_state: optimizer state of the trainable leaves alone.
      guard: what bad steps are known by.
    """

    step: Int[Array, ""]
    params: Any
    adapters: Any
    opt_state: Any
    guard: spikes.Guard


def init_params(config: RunConfig) -> Any:
    """Random parameters of the model, the same for one seed."""
    tokens_BT = jnp.zeros((1, 2), jnp.int32)
    # How it is computed matters not to the parameters, and the kernels asked for may not be here.
    return Llama(config.model, Compute(layers="scan")).init(_key(config, "params"), tokens_BT)["params"]


def init_state(config: RunConfig, methods: Methods, params: Any) -> TrainState:
    """The state before the first update, on top of the given parameters."""
    adapters = transform.attach(_key(config, "adapters"), params, methods)
    trainable, _ = transform.partition(params, adapters, methods)
    opt_state = _optimizer(config, methods, params, adapters).init(trainable)
    return TrainState(jnp.zeros((), jnp.int32), params, adapters, opt_state, spikes.init(config.bad_steps))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def train_step(
    config: RunConfig, methods: Methods, state: TrainState, tokens_BT: Int[Array, "B T"]
) -> tuple[TrainState, Metrics]:
    """One update, or none where the step is bad. The state is donated.

    Returns:
      The next state and scalars: loss (nats a token), grad_norm (before clipping), learning_rate,
      skipped_steps (of the whole run) and bad_in_a_row.
    """
    trainable, frozen = transform.partition(state.params, state.adapters, methods)
    loss, gradients = _mean_gradient(config, methods, trainable, frozen, tokens_BT, state.step)
    grad_norm = optax.tree.norm(gradients)
    if config.optimizer.clip_norm:
        shrink = jnp.minimum(1.0, config.optimizer.clip_norm / (grad_norm + 1e-6))
        gradients = jax.tree.map(lambda g: g * shrink, gradients)
    optimizer = _optimizer(config, methods, state.params, state.adapters)
    updates, opt_state = optimizer.update(gradients, state.opt_state, trainable)
    rate = optim.learning_rate(config, state.step)
    bad, seen = spikes.judge(config.bad_steps, state.guard, loss, grad_norm)
    updated = jax.tree.map(lambda p, u: p - rate * u, trainable, updates)
    arrays = trees.combine(spikes.unless(bad, updated, trainable), frozen)
    opt_state = spikes.unless(bad, opt_state, state.opt_state)
    state = TrainState(state.step + 1, arrays["params"], arrays.get("adapters", {}), opt_state, seen)
    scalars = {"loss": loss, "grad_norm": grad_norm, "learning_rate": rate}
    return sharding.pin(state), scalars | {"skipped_steps": seen.skipped, "bad_in_a_row": seen.in_a_row}


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def restart_step(
    config: RunConfig, methods: Methods, state: TrainState
) -> tuple[TrainState, Float[Array, ""]]:
    """The restart before update `state.step`: merge, initialise anew, clear the adapters' optimizer state
    or a share of it.

    The methods that follow are `methods.after_restart()`.

    Returns:
      The new state and the share of the adapters' optimizer state that was really cleared.
    """
    adapter_key = jax.random.fold_in(_key(config, "adapters"), state.step)
    params, adapters, _ = transform.restart(adapter_key, state.params, state.adapters, methods)
    pruning_key = jax.random.fold_in(_key(config, "pruning"), state.step)
    opt_state, cleared = optim.clear_adapters(state.opt_state, config.restart, pruning_key)
    seen = spikes.after_restart(config.bad_steps, state.guard)
    return sharding.pin(TrainState(state.step, params, adapters, opt_state, seen)), cleared


@functools.partial(jax.jit, static_argnums=(0, 1))
def eval_step(
    model: Llama, methods: Methods, params: Any, adapters: Any, tokens_BT: Int[Array, "B T"], weights_B: Array
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The summed loss (nats) and the number of predictions of a batch whose padding rows weigh 0."""
    return _loss(model, methods, params, adapters, tokens_BT, weights_B)


def _loss(
    model: Llama,
    methods: Methods,
    params: Any,
    adapters: Any,
    tokens_BT: Array,
    weights_B: Array,
    rngs: dict[str, PRNGKeyArray] | None = None,
) -> Any:
    variables = {"params": params, "adapter": transform.bind(adapters, methods)}
    return model.apply(variables, tokens_BT, weights_B, method=Llama.loss, rngs=rngs)


def _mean_gradient(
    config: RunConfig, methods: Methods, trainable: Any, frozen: Any, tokens_BT: Array, step: Array
) -> tuple[Array, Any]:
    """The mean loss of the batch and its gradient for the trainable leaves, microbatch by microbatch."""
    model = Llama(config.model, config.compute)
    key = jax.random.fold_in(_key(config, "dropout"), step)
    drops = any(method.dropout for _, method in methods.adapted())

    def mean_loss(trainable: Any, tokens_BT: Array, part: int | Array) -> Array:
        arrays = trees.combine(trainable, frozen)
        ones_B = jnp.ones(tokens_BT.shape[0])
        rngs = {"dropout": jax.random.fold_in(key, part)} if drops else None
        params, adapters = arrays["params"], arrays.get("adapters", {})
        total, count = _loss(model, methods, params, adapters, tokens_BT, ones_B, rngs)
        return total / count

    if config.microbatches == 1:
        return jax.value_and_grad(mean_loss)(trainable, tokens_BT, 0)

    def accumulate(carry: Any, inputs: tuple[Array, Array]) -> tuple[Any, None]:
        # Every microbatch holds as many predictions, so the mean of means is the mean.
        part = jax.value_and_grad(mean_loss)(trainable, *inputs)
        return jax.tree.map(lambda a, b: a + b / config.microbatches, carry, part), None

    start = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, trainable))
    # Interleaved, so that each microbatch is spread over the devices as the batch is.
    parts_MBT = tokens_BT.reshape(-1, config.microbatches, tokens_BT.shape[1]).swapaxes(0, 1)
    return jax.lax.scan(accumulate, start, (parts_MBT, jnp.arange(config.microbatches)))[0]


def _optimizer(
    config: RunConfig, methods: Methods, params: Any, adapters: Any
) -> optax.GradientTransformation:
    return optim.adamw(config.optimizer, transform.labels(params, adapters, methods))


def random_state(config: RunConfig, step: int) -> dict[str, list[int]]:
    """The next numbers of each stream of random numbers at a step: of one key another version of JAX, or
    another of its options, may draw others."""
    keys = {stream: jax.random.fold_in(_key(config, stream), step) for stream in STREAMS}
    return {stream: jax.random.bits(key, (4,)).tolist() for stream, key in keys.items()}


def _key(config: RunConfig, purpose: str) -> Array:
    return jax.random.fold_in(jax.random.key(config.seed), STREAMS.index(purpose))
