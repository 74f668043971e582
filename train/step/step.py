"""The pure functions that change the state: one update, one restart, one evaluation batch."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from mora_jax import sharding, transform, trees
from mora_jax.models.batch import Batch
from mora_jax.models.llama import Llama
from mora_jax.orienting import orient
from mora_jax.transform import Methods
from train.step import optim, spikes
from train.step.spec import StepSpec
from train.step.state import TrainState, key_of, layouts

Metrics = dict[str, Array]


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def train_step(
    spec: StepSpec, methods: Methods, state: TrainState, batch: Batch
) -> tuple[TrainState, Metrics]:
    """Does one update, or none if the step is bad. The state is donated.

    Returns:
      The next state and scalars: loss (nats a token that counts), grad_norm (before clipping), learning_rate,
      skipped_steps (of the run so far) and bad_in_a_row.
    """
    trainable, frozen = transform.partition(state.params, state.adapters, methods)
    loss, gradients = _mean_gradient(spec, methods, trainable, frozen, batch, state.step)
    grad_norm = optax.tree.norm(gradients)
    if spec.optimizer.clip_norm:
        shrink = jnp.minimum(1.0, spec.optimizer.clip_norm / (grad_norm + 1e-6))
        gradients = jax.tree.map(lambda g: g * shrink, gradients)
    options = optim.array_options(spec.optimizer, methods)
    tx = optim.optimizer(spec.optimizer, options, layouts(methods), spec.compute.dtype)
    updates, opt_state = tx.update(gradients, state.opt_state, trainable)
    rate = optim.learning_rate(spec, state.step)
    bad, history = spikes.judge(spec.bad_steps, state.spikes, loss, grad_norm)
    updated = jax.tree.map(lambda p, u: p - rate * u, trainable, updates)
    arrays = trees.combine(spikes.unless(bad, updated, trainable), frozen)
    opt_state = spikes.unless(bad, opt_state, state.opt_state)
    state = TrainState(state.step + 1, arrays["params"], arrays.get("adapters", {}), opt_state, history)
    scalars = {"loss": loss, "grad_norm": grad_norm, "learning_rate": rate}
    counts = {"skipped_steps": history.skipped, "bad_in_a_row": history.in_a_row}
    return sharding.pin(state, layouts(methods)), scalars | counts


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def restart_step(spec: StepSpec, methods: Methods, state: TrainState) -> tuple[TrainState, Float[Array, ""]]:
    """Restarts before update `state.step`: merges, initialises new adapters, clears their optimizer state.

    The methods that follow are `methods.after_restart()`.

    Returns:
      The new state, and the share of the adapters' optimizer state that was cleared.
    """
    adapter_key = jax.random.fold_in(key_of(spec, "adapters"), state.step)
    params, adapters, following = transform.restart(adapter_key, state.params, state.adapters, methods)
    pruning_key = jax.random.fold_in(key_of(spec, "pruning"), state.step)
    labels = optim.adapter_labels(optim.array_options(spec.optimizer, methods))
    opt_state, cleared = optim.clear_adapters(state.opt_state, spec.restart, pruning_key, labels)
    history = spikes.after_restart(spec.bad_steps, state.spikes)
    state = TrainState(state.step, params, adapters, opt_state, history)
    return sharding.pin(state, layouts(following)), cleared


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def orient_step(spec: StepSpec, methods: Methods, state: TrainState, batch: Batch) -> TrainState:
    """Fits adapters without an update, as at the start and after a restart, to the kernels' gradients.

    Needs the memory of these gradients beside the state. Outputs of the model do not change.
    """
    kernels = {f"params/{path}" for path, _ in methods.orientable()}
    both = {"params": state.params, "adapters": state.adapters}
    adapted, others = trees.split(both, kernels.__contains__)
    _, gradients = _mean_gradient(spec, methods, adapted, others, batch, state.step)
    key = jax.random.fold_in(key_of(spec, "bases"), state.step)
    adapters = orient(state.adapters, methods, gradients["params"], key)
    return sharding.pin(dataclasses.replace(state, adapters=adapters), layouts(methods))


@functools.partial(jax.jit, static_argnums=(0, 1))
def eval_step(
    model: Llama, methods: Methods, params: Any, adapters: Any, batch: Batch
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the summed loss (nats) of the tokens of a batch that count, and the sum of their weights."""
    return _loss(model, methods, params, adapters, batch)


def _loss(
    model: Llama,
    methods: Methods,
    params: Any,
    adapters: Any,
    batch: Batch,
    rngs: dict[str, PRNGKeyArray] | None = None,
) -> Any:
    variables = {"params": transform.bind(params, adapters, methods)}
    return model.apply(variables, batch, method=Llama.loss, rngs=rngs)


def _mean_gradient(
    spec: StepSpec, methods: Methods, trainable: Any, frozen: Any, batch: Batch, step: Array
) -> tuple[Array, Any]:
    """Returns the mean loss of the batch and its gradient for the trainable leaves, by microbatches.

    The mean is over the tokens that count in the batch, however they lie in its microbatches.
    """
    model = Llama(spec.model, spec.compute)
    key = jax.random.fold_in(key_of(spec, "dropout"), step)
    drops = any(method.dropout for _, method in methods.adapted())
    count = jnp.maximum(batch.target_weights().sum(), 1)

    def share(trainable: Any, batch: Batch, part: int | Array) -> Array:
        arrays = trees.combine(trainable, frozen)
        rngs = {"dropout": jax.random.fold_in(key, part)} if drops else None
        params, adapters = arrays["params"], arrays.get("adapters", {})
        total, _ = _loss(model, methods, params, adapters, batch, rngs)
        return total / count

    if spec.microbatches == 1:
        return jax.value_and_grad(share)(trainable, batch, 0)

    def accumulate(carry: Any, inputs: tuple[Batch, Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, carry, jax.value_and_grad(share)(trainable, *inputs)), None

    def parts(rows: Array) -> Array:
        # Interleaved, so that each microbatch is spread over the devices as the batch is.
        return rows.reshape(-1, spec.microbatches, *rows.shape[1:]).swapaxes(0, 1)

    # A bfloat16 kernel's gradient, which orients, is summed in float32.
    start = (jnp.zeros(()), jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), trainable))
    inputs = (jax.tree.map(parts, batch), jnp.arange(spec.microbatches))
    return jax.lax.scan(accumulate, start, inputs)[0]
