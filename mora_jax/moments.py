"""What a restart does to the optimizer state of adapters: start it anew, prune or average its moments."""

import zlib
from collections.abc import Set
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray

from mora_jax.errors import InputError

Clear: TypeAlias = Literal["reset", "magnitude", "random", "mean"]


def clear(opt_state: Any, fresh: Any, labels: Set[str], how: Clear, share: float, key: PRNGKeyArray) -> Any:
    """Clears the optimizer state of adapters, or a share of it, after their update was merged.

    "reset" starts it anew. Counts of learning rate schedules and injected hyper-parameters stay. Pruning
    zeroes a share of the non-zero entries of each Adam moment of each kernel, the smallest ones ("magnitude")
    or random ones (ReLoRA, arXiv:2307.05695), and keeps Adam's count. "mean" zeroes the first moments,
    replaces each second moment by the mean over its kernel, and keeps the count: the next update then has the
    size of the last one, in other directions.

    Args:
      opt_state: any Optax state; what belongs to adapters lies in states of `optax.partition`.
      fresh: the state that the optimizer's `init` returns.
      labels: labels of the adapters in `optax.partition`.
      how: what to do.
      share: share to prune.
      key: random key of pruning.

    Raises:
      InputError: if there is no state of these labels, or nothing to prune, as without Adam's moments.
    """
    _check(how, share)
    found: set[str] = set()
    pruned: list[Any] = []

    def cleared(path: Any, old: Any, new: Any) -> Any:
        if isinstance(old, optax.ScaleByScheduleState):
            return old
        if isinstance(old, _INJECTED):
            inner = jax.tree_util.tree_map_with_path(
                lambda p, a, b: cleared((*path, *p), a, b),
                old.inner_state,
                new.inner_state,
                is_leaf=_is_whole,
            )
            return old._replace(inner_state=inner)
        if how == "reset":
            return new
        if not isinstance(old, optax.ScaleByAdamState):
            return old
        pruned.append(path)
        own_key = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
        if how == "mean":
            mu, nu = jax.tree.map(jnp.zeros_like, old.mu), jax.tree.map(_averaged, old.nu)
            return old._replace(mu=mu, nu=nu)
        mu_key, nu_key = jax.random.split(own_key)
        return old._replace(mu=_pruned(old.mu, how, share, mu_key), nu=_pruned(old.nu, how, share, nu_key))

    def by_label(path: Any, old: Any, new: Any) -> Any:
        if not is_partition(old):
            # Other transformations keep something of the old adapters, such as MultiSteps their gradients.
            return new if jax.tree_util.DictKey("adapters") in path else old
        found.update(labels & old.inner_states.keys())
        ours, others = ({k: s for k, s in p.inner_states.items() if k in labels} for p in (old, new))
        states = jax.tree_util.tree_map_with_path(cleared, ours, others, is_leaf=_is_whole)
        return old._replace(inner_states={**old.inner_states, **states})

    result = jax.tree_util.tree_map_with_path(by_label, opt_state, fresh, is_leaf=is_partition)
    if labels - found:
        raise InputError("there is no optimizer state of adapters: make the optimizer with State.optimizer")
    if how != "reset" and not pruned:
        what = how if how == "mean" else f"{how} pruning"
        raise InputError(f"{what} needs an optimizer with optax.scale_by_adam, such as optax.adamw")
    return result


def is_partition(node: Any) -> bool:
    """Returns whether a node of an optimizer state is that of `optax.partition`."""
    return isinstance(node, optax.transforms.PartitionState)


def _check(how: str, share: float) -> None:
    if how not in get_args(Clear):
        raise InputError(f"how is one of {', '.join(get_args(Clear))}, not {how!r}")
    if not 0 <= share <= 1:
        raise InputError(f"the share to prune lies in [0, 1], not {share}")


_INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)


def _is_whole(node: Any) -> bool:
    return isinstance(node, (optax.ScaleByAdamState, optax.ScaleByScheduleState, *_INJECTED))


def _pruned(moments: Any, how: Clear, share: float, key: PRNGKeyArray) -> Any:
    leaves, structure = jax.tree.flatten(moments)
    keys = jax.random.split(key, len(leaves))
    pruned = [_pruned_stack(x, how, share, k) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, pruned)


def _averaged(x: Array) -> Array:
    """Returns each kernel's array with the mean of its non-zero entries in their places."""
    counts = x != 0  # padding is zero and stays so
    axes = tuple(range(x.ndim)[-2:])
    mean = x.sum(axes, keepdims=True) / jnp.maximum(counts.sum(axes, keepdims=True), 1)
    return jnp.where(counts, mean, 0.0)


def _pruned_stack(x: Array, how: Clear, share: float, key: PRNGKeyArray) -> Array:
    """Returns a kernel's array pruned, or each layer of a stack."""
    if x.ndim > 2:
        keys = jax.random.split(key, x.shape[0])
        return jax.vmap(lambda x, k: _pruned_stack(x, how, share, k))(x, keys)
    share = float(share)
    if how == "random":
        return jnp.where(jax.random.bernoulli(key, share, x.shape), 0.0, x)
    size = jnp.where(x == 0, jnp.nan, jnp.abs(x))  # padding is zero and does not count
    return jnp.where(size > jnp.nanquantile(size, share), x, 0.0)
