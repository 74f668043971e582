"""Learning-rate schedules, AdamW by parameter group, and what a restart does to its state."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mora_jax import transform
from train.config.run import RunConfig
from train.config.sections import Optimizer, Restart

UNDECAYED = ("scale", "magnitude_D")


def learning_rate(config: RunConfig, step: Int[Array, ""]) -> Float[Array, ""]:
    """The rate of update `step` (from 0), computed in float32.

    "jagged-cosine" follows one cosine over the whole run; after a restart the rate climbs from 0 to where the
    cosine will be when the restart's warm-up ends (ReLoRA, arXiv:2307.05695, section 3).
    """
    warmup, total = config.schedule.warmup, config.steps
    step = jnp.asarray(step, jnp.float32)
    ratio = jnp.where(
        step < warmup, step / max(warmup, 1), _decay(config, (step - warmup) / max(total - warmup, 1))
    )
    if config.schedule.kind == "jagged-cosine":
        every, again = config.restart.every, config.restart.warmup
        since = step % every
        end = _decay(config, (step - since + again - warmup) / max(total - warmup, 1))
        ratio = jnp.where((since < again) & (step >= every), since / max(again, 1) * end, ratio)
    return config.optimizer.learning_rate * ratio


def _decay(config: RunConfig, progress: Array) -> Array:
    progress = jnp.clip(progress, 0.0, 1.0)
    left = 1 - progress if config.schedule.kind == "linear" else 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return config.schedule.min_ratio + (1 - config.schedule.min_ratio) * left


def adamw(config: Optimizer, labels: Any) -> optax.GradientTransformation:
    """AdamW without its learning rate: one state for each group of `mora_jax.labels`.

    The rate follows the train step and not a count kept here, so that a reset of a group's state leaves it.
    """
    groups = sorted(set(jax.tree.leaves(labels)))
    return optax.partition({group: _group(config, group) for group in groups}, labels)


def _group(config: Optimizer, group: str) -> optax.GradientTransformation:
    parts = [optax.scale_by_adam(config.b1, config.b2, config.eps)]
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=_decayed))
    return optax.chain(*parts, optax.scale(transform.lr_scale(group)))


def _decayed(params: Any) -> Any:
    """Kernels and factors are decayed; norms' scales and DoRA's magnitudes, known by their names, are not."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: getattr(path[-1], "key", None) not in UNDECAYED, params
    )


def clear_adapters(opt_state: Any, how: Restart, key: PRNGKeyArray) -> tuple[Any, Float[Array, ""]]:
    """Zeroes the Adam state of every group of adapters, or a share of it, as `how` says.

    "reset" zeroes moments and count; pruning zeroes `how.prune` of the non-zero entries of each moment of
    each layer, the smallest or any (ReLoRA, arXiv:2307.05695), and keeps the count.

    Returns:
      The new state, and the share of the moments' non-zero entries that was really cleared.
    """
    adapters = {g: s for g, s in opt_state.inner_states.items() if transform.is_adapter_group(g)}

    def clear(path: Any, state: Any) -> Any:
        if not isinstance(state, optax.ScaleByAdamState):
            return state
        if how.optimizer == "reset":
            return jax.tree.map(jnp.zeros_like, state)
        own_key = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
        mu_key, nu_key = jax.random.split(own_key)
        return state._replace(mu=_pruned(state.mu, how, mu_key), nu=_pruned(state.nu, how, nu_key))

    fresh = jax.tree_util.tree_map_with_path(clear, adapters, is_leaf=_is_adam)
    before, after = (_non_zero(_moments(state)) for state in (adapters, fresh))
    cleared = 1 - after / jnp.maximum(before, 1)
    return opt_state._replace(inner_states=opt_state.inner_states | fresh), cleared


def _pruned(moments: Any, how: Restart, key: PRNGKeyArray) -> Any:
    leaves, structure = jax.tree.flatten(moments)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        structure, [_pruned_stack(x, how, k) for x, k in zip(leaves, keys, strict=True)]
    )


def _pruned_stack(x: Array, how: Restart, key: PRNGKeyArray) -> Array:
    """Of a kernel's array, or of each layer of a stack of them."""
    if x.ndim > 2:
        return jax.vmap(lambda x, k: _pruned_stack(x, how, k))(x, jax.random.split(key, x.shape[0]))
    if how.optimizer == "random":
        return jnp.where(jax.random.bernoulli(key, how.prune, x.shape), 0.0, x)
    size = jnp.where(x == 0, jnp.nan, jnp.abs(x))  # padding, which is zero, counts for no share
    return jnp.where(size > jnp.nanquantile(size, how.prune), x, 0.0)


def _is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


def _moments(state: Any) -> list[Any]:
    return [(s.mu, s.nu) for s in jax.tree.leaves(state, is_leaf=_is_adam) if _is_adam(s)]


def _non_zero(tree: Any) -> Array:
    counts = [jnp.count_nonzero(leaf).astype(jnp.float32) for leaf in jax.tree.leaves(tree)]
    return jnp.sum(jnp.stack(counts))
