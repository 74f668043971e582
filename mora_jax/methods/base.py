"""What a method is, and `dense`, the linear layer that applies one.

Legend of shapes in names: K inputs, D outputs of a kernel; leading axes of x are batch.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from mora_jax.errors import InputError

Arrays: TypeAlias = Mapping[str, Array]
Path: TypeAlias = Literal["auto", "merged", "activation"]

# Merging costs O(k d) a step whatever the batch; compressing costs O(tokens (k + d)). Below this many tokens
# in a batch the second is smaller for every layer of a LLaMA.
MERGED_MIN_TOKENS = 2048


@dataclasses.dataclass(frozen=True)
class Leaf:
    """How one array of an adapter is trained: at all, and at what multiple of the learning rate."""

    trainable: bool = True
    lr_scale: float = 1.0


class Method:
    """One way to update a kernel: frozen, hashable hyper-parameters and pure functions of arrays.

    Subclasses are frozen dataclasses. Everything here speaks of one kernel `(k, d)`, laid out (inputs,
    outputs); stacked kernels are handled by `jax.vmap` outside.
    """

    name: ClassVar[str]
    additive: ClassVar[bool] = True  # whether `delta` exists
    dropout: float = 0.0  # share of the adapter's inputs zeroed in training; a field where a method has it

    def init(self, key: PRNGKeyArray, w: Float[Array, "K D"]) -> dict[str, Array]:
        """The adapter's arrays (float32) for a kernel like w, such that `weight(arrays, w) == w`."""
        raise NotImplementedError

    def leaves(self) -> dict[str, Leaf]:
        """How each array that `init` makes is trained."""
        raise NotImplementedError

    def count(self, k: int, d: int) -> int:
        """The trainable parameters of a (k, d) kernel's adapter, without any padding of stored arrays."""
        raise NotImplementedError

    def rank_bound(self, k: int, d: int) -> int:
        """The rank that the update of a (k, d) kernel can have, which it has for almost all arrays."""
        raise NotImplementedError

    def weight(self, arrays: Arrays, w: Float[Array, "K D"]) -> Float[Array, "K D"]:
        """The effective kernel: the definition of the method."""
        raise NotImplementedError

    def delta(self, arrays: Arrays, x: Float[Array, "*B K"], d: int) -> Float[Array, "*B D"]:
        """For additive methods `x @ (weight(arrays, w) - w)` without w: linear in x, computed in x's type."""
        raise NotImplementedError(f"{self.name} is not additive: it has no update that is linear in x alone")

    def after_restart(self) -> "Method":
        """The method that follows once this one's update has been merged."""
        return self


@functools.partial(jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["method"])
@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter's arrays with the method that gives them meaning; made only where the model is applied."""

    arrays: Arrays
    method: Method


def dense(
    x: Float[Array, "*B K"],
    ws: Sequence[Float[Array, "K ?D"]],
    adapters: Sequence[Adapter | None],
    path: Path = "auto",
    dropout_key: PRNGKeyArray | None = None,
) -> list[Float[Array, "*B ?D"]]:
    """Applies one or several kernels to one input, in one product, each with an adapter of its own or none.

    Two paths compute `y = x @ weight(arrays, w)` for additive methods. The *merged* path multiplies by the
    effective kernel, added in float32, and takes the adapter's gradient by the vjp of `delta` at the saved
    x. The *activation* path computes `x @ w + delta(arrays, x)`. A base that is not float32 always takes the
    second, since adding a small update to it would round the update away.

    Args:
      x: the input, in the type to compute in.
      ws: kernels (k, d_i), of the stored type.
      adapters: one entry a kernel.
      path: forces a path where there is a choice; "auto" takes the merged one for large batches over a
        float32 base.
      dropout_key: given in training where a method has dropout, which takes the activation path.

    Returns:
      One output a kernel, in x's type.
    """
    if all(a is None for a in adapters):
        return _product(x, ws)
    if not any(a.method.additive for a in adapters if a):
        return _by_weights(x, ws, adapters)
    # Beside additive ones, a method that is not has its weight differentiated as it stands.
    ws = [_own_weight(w, a) for w, a in zip(ws, adapters, strict=True)]
    adapters = [a if a is not None and a.method.additive else None for a in adapters]
    key = dropout_key if any(a.method.dropout for a in adapters if a) else None
    if key is None and _merges(x, ws, path):
        methods = tuple(a.method if a else None for a in adapters)
        return _merged(methods, x, tuple(ws), tuple(dict(a.arrays) if a else {} for a in adapters))
    ys = _product(x, ws)
    for i, adapter in enumerate(adapters):
        if adapter:
            z = x if key is None else _dropped(x, adapter.method.dropout, jax.random.fold_in(key, i))
            ys[i] = ys[i] + adapter.method.delta(adapter.arrays, z, ws[i].shape[-1])
    return ys


def check_dropout(rate: float) -> None:
    """Raises InputError unless the rate lies in [0, 1)."""
    if not 0 <= rate < 1:
        raise InputError(f"dropout lies in [0, 1), not {rate}")


def check_alpha(alpha: float) -> None:
    """Raises InputError unless alpha is finite."""
    if not math.isfinite(alpha):
        raise InputError(f"alpha is finite, not {alpha}")


@jax.checkpoint
def _by_weights(x: Array, ws: Sequence[Array], adapters: Sequence[Adapter | None]) -> list[Array]:
    """x times the effective kernels, which the backward pass makes again rather than keeps."""
    return _product(x, [_own_weight(w, a) for w, a in zip(ws, adapters, strict=True)])


def _own_weight(w: Array, adapter: Adapter | None) -> Array:
    if adapter is None or adapter.method.additive:
        return w
    return adapter.method.weight(adapter.arrays, w)


def _dropped(x: Array, rate: float, key: PRNGKeyArray) -> Array:
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))


def _merges(x: Array, ws: Sequence[Array], path: Path) -> bool:
    if any(w.dtype != jnp.float32 for w in ws):
        return False
    tokens = x.size // x.shape[-1]
    return path == "merged" or (path == "auto" and tokens >= MERGED_MIN_TOKENS)


def _product(x: Array, ws: Sequence[Array]) -> list[Array]:
    w = jnp.concatenate([w.astype(x.dtype) for w in ws], axis=-1)
    return _cut(x @ w, ws)


def _cut(y: Array, ws: Sequence[Array]) -> list[Array]:
    """Cuts the last axis of y into the widths of the kernels."""
    ends = [sum(w.shape[-1] for w in ws[: i + 1]) for i in range(len(ws))]
    return [y[..., end - w.shape[-1] : end] for end, w in zip(ends, ws, strict=True)]


MaybeMethods: TypeAlias = tuple[Method | None, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _merged(
    methods: MaybeMethods, x: Array, ws: tuple[Array, ...], arrays: tuple[Arrays, ...]
) -> list[Array]:
    return _product(x, _effective(methods, ws, arrays))


def _effective(methods: MaybeMethods, ws: Sequence[Array], arrays: Sequence[Arrays]) -> list[Array]:
    return [m.weight(a, w) if m else w for m, w, a in zip(methods, ws, arrays, strict=True)]


def _merged_forward(
    methods: MaybeMethods, x: Array, ws: tuple[Array, ...], arrays: tuple[Arrays, ...]
) -> Any:
    # The effective kernels are not saved: making them again costs O(k d), keeping them a copy of the model.
    return _merged(methods, x, ws, arrays), (x, ws, arrays)


def _merged_backward(methods: MaybeMethods, saved: Any, dys: list[Array]) -> Any:
    x, ws, arrays = saved
    w = jnp.concatenate([w.astype(x.dtype) for w in _effective(methods, ws, arrays)], axis=-1)
    dx = jnp.concatenate(dys, axis=-1) @ w.T
    dws = tuple(_outer(x, dy, w) for w, dy in zip(ws, dys, strict=True))  # removed by XLA where w is frozen
    return (
        dx,
        dws,
        tuple(_adapter_gradient(m, a, x, dy) for m, a, dy in zip(methods, arrays, dys, strict=True)),
    )


def _outer(x: Array, dy: Array, w: Array) -> Array:
    return jnp.einsum("...k,...d->kd", x, dy, preferred_element_type=jnp.float32).astype(w.dtype)


def _adapter_gradient(method: Method | None, arrays: Arrays, x: Array, dy: Array) -> Arrays:
    if method is None:
        return {}
    _, vjp = jax.vjp(lambda a: method.delta(a, x, dy.shape[-1]), arrays)
    return vjp(dy)[0]


_merged.defvjp(_merged_forward, _merged_backward)
