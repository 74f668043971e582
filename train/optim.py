"""Learning-rate schedules, AdamW by parameter group, and what a restart does to its state."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from mora_jax import transform
from train.config import Optimizer, RunConfig


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
    """Kernels and adapters are decayed; norms' scales, known by their name, are not."""
    return jax.tree_util.tree_map_with_path(lambda path, _: getattr(path[-1], "key", None) != "scale", params)


def reset_adapters(opt_state: Any) -> tuple[Any, Float[Array, ""]]:
    """Zeroes the Adam state (moments and count) of every group of adapters.

    Returns:
      The new state, and the share of its non-zero entries that was really cleared.
    """
    inner = opt_state.inner_states
    fresh = {g: _zeroed(s) if transform.is_adapter_group(g) else s for g, s in inner.items()}
    before = _non_zero({g: s for g, s in inner.items() if transform.is_adapter_group(g)})
    after = _non_zero({g: s for g, s in fresh.items() if transform.is_adapter_group(g)})
    return opt_state._replace(inner_states=fresh), 1 - after / jnp.maximum(before, 1)


def _zeroed(state: Any) -> Any:
    def zero(node: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, node) if isinstance(node, optax.ScaleByAdamState) else node

    return jax.tree.map(zero, state, is_leaf=lambda node: isinstance(node, optax.ScaleByAdamState))


def _non_zero(tree: Any) -> Array:
    counts = [jnp.count_nonzero(leaf).astype(jnp.float32) for leaf in jax.tree.leaves(tree)]
    return jnp.sum(jnp.stack(counts))
