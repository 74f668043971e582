"""`dense`: kernels and their adapters applied to one input, and the gradients of both.

Legend of shapes in names: K inputs, D outputs of a kernel; leading axes of x are batch.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from mora_jax import sharding
from mora_jax.methods.base import Adapter, Arrays, Method, outer, padded
from mora_jax.sharding import Layout

Path: TypeAlias = Literal["auto", "merged", "compressed", "folded", "activation"]

# Matrix units work in tiles of this width: 32768 x 2048 x 5461 runs at a third of the speed of x 5504.
TILE = 128


def dense(
    x: Float[Array, "*B K"],
    ws: Sequence[Float[Array, "K ?D"]],
    adapters: Sequence[Adapter | None],
    path: Path = "auto",
    dropout_key: PRNGKeyArray | None = None,
    tile: int = 1,
    layouts: Sequence[Layout] | None = None,
) -> list[Float[Array, "*B ?D"]]:
    """Applies one or several kernels to one input, in one product, each with an adapter of its own or none.

    Two paths compute `y = x @ weight(arrays, w)` for additive methods. The *merged* path multiplies by the
    effective kernel, added in float32. Its backward pass computes the adapter's gradient from the saved x:
    by the vjp of `delta` (*compressed*), by the vjp of `weight` at the full `x^T dy` (*folded*), or as the
    method finds cheapest. The *activation* path computes `x @ w + delta(arrays, x)`. A base that is not
    float32 always takes the activation path, since adding a small update would round it away. Methods that
    are not additive always take the merged path, folded.

    Args:
      x: the input, in the type to compute in. It may be wider than the kernels, padded with zeros.
      ws: kernels (k, d_i), in the stored type.
      adapters: one entry for each kernel.
      path: forces a path where there is a choice: "merged", the same with "compressed" or "folded" gradients,
        or "activation". "auto" merges for large batches over a float32 base.
      dropout_key: random key of a training step whose methods have dropout, which takes the activation path.
      tile: outputs are padded with zeros to a multiple of this.
      layouts: how each kernel may be divided over an ambient mesh. Without it, XLA decides.

    Returns:
      One output for each kernel, in x's type.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from mora_jax import Adapter, LoRA, dense
      >>> x, w, lora = jnp.ones((2, 8)), jnp.ones((8, 4)), LoRA(rank=2)
      >>> adapter = Adapter(lora.init(jax.random.key(0), w), lora)
      >>> [y.shape for y in dense(x, [w, w], [adapter, None])]
      [(2, 4), (2, 4)]
    """
    known = list(layouts) if layouts and sharding.in_use() else [None] * len(ws)
    # Each kernel draws the same dropout mask whether the kernels share a product or not.
    keys: Sequence[PRNGKeyArray | None] = [dropout_key] * len(ws)
    if dropout_key is not None and len(ws) > 1:
        keys = [jax.random.fold_in(dropout_key, i) for i in range(len(ws))]
    kernels = [_Kernel(*parts) for parts in zip(ws, adapters, known, keys, strict=True)]
    if len(ws) > 1 and (sharding.divides_products() or all(w.dtype == x.dtype for w in ws)):
        # Kernels that need no cast would be copied just to be joined. A mesh that divides kernels along
        # their widths would move every shard.
        return [y for kernel in kernels for y in _applied(x, [kernel], path, tile)]
    return _applied(x, kernels, path, tile)


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """One kernel as `dense` takes it."""

    w: Array
    adapter: Adapter | None
    layout: Layout | None
    dropout_key: PRNGKeyArray | None


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["w", "arrays"], meta_fields=["method", "layout"]
)
@dataclasses.dataclass(frozen=True)
class _Factor:
    """One kernel as a product takes it; its gradient has the same form.

    Attributes:
      w: the stored kernel.
      arrays: arrays of an adapter that is merged into it; empty if none is.
      method: the method of that adapter.
      layout: how the kernel lies on an ambient mesh; None if there is none.
    """

    w: Array
    arrays: Arrays
    method: Method | None
    layout: Layout | None


def _applied(x: Array, kernels: Sequence[_Kernel], path: Path, tile: int) -> list[Array]:
    merged = _merged(x, kernels, path)
    factors = tuple(
        _Factor(k.w, dict(k.adapter.arrays), k.adapter.method, k.layout)
        if k.adapter and inside
        else _Factor(k.w, {}, None, k.layout)
        for k, inside in zip(kernels, merged, strict=True)
    )
    y: Any = _product(path, tile, x, factors)
    ys = jnp.split(y, _ends(_widths(factors, tile)), axis=-1)
    return [
        y + padded(_delta(x, k), -1, tile) if k.adapter and not inside else y
        for y, k, inside in zip(ys, kernels, merged, strict=True)
    ]


def _merged(x: Array, kernels: Sequence[_Kernel], path: Path) -> list[bool]:
    """Returns which kernels' adapters are merged into the product: the only choice between the paths."""
    adapters = [k.adapter for k in kernels if k.adapter]
    drops = any(k.adapter.method.dropout for k in kernels if k.adapter and k.dropout_key is not None)
    wants = merges_float32(x.size // x.shape[-1], path, [a.method for a in adapters])
    merges = wants and not drops and all(k.w.dtype == jnp.float32 for k in kernels)
    return [k.adapter is not None and (merges or not k.adapter.method.additive) for k in kernels]


def merges_float32(tokens: float, path: Path, methods: Iterable[Method]) -> bool:
    """Returns whether adapters of the given methods over float32 kernels take the merged path.

    Args:
      tokens: tokens of a batch.
      path: path that is asked for, as in `dense`.
      methods: methods of the kernels of one product.
    """
    if path != "auto":
        return path != "activation"
    return all(tokens >= method.merged_min_tokens for method in methods)


def _delta(x: Array, kernel: _Kernel) -> Array:
    """Returns what a kernel's adapter adds to its output, with dropout of the adapter's inputs."""
    adapter, key = kernel.adapter, kernel.dropout_key
    assert adapter
    x, rate = x[..., : kernel.w.shape[0]], adapter.method.dropout
    if key is not None and rate:
        kept = jax.random.bernoulli(key, 1 - rate, x.shape)
        x = jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))
    arrays = _replicated(adapter.arrays, adapter.method, kernel.layout)
    return adapter.method.delta(arrays, x, kernel.w.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(path: Path, tile: int, x: Array, factors: tuple[_Factor, ...]) -> Any:
    """Returns x times the effective kernels, side by side."""
    return x @ _effective(tile, x, factors)


def _effective(tile: int, x: Array, factors: Sequence[_Factor]) -> Array:
    """Returns the effective kernels in x's type, rows padded to x's width and columns to full tiles."""
    merged = [
        f.method.weight(_replicated(f.arrays, f.method, f.layout), f.w) if f.method else f.w for f in factors
    ]
    cast = [w.astype(x.dtype) for w in merged]
    used = [sharding.gathered(w, f.layout) if f.layout else w for w, f in zip(cast, factors, strict=True)]
    return jnp.concatenate([padded(padded(w, 0, x.shape[-1]), 1, tile) for w in used], axis=-1)


def _product_forward(path: Path, tile: int, x: Array, factors: tuple[_Factor, ...]) -> Any:
    # The effective kernels are not saved: recomputing costs O(k d), saving would cost a copy of the model.
    return _product(path, tile, x, factors), (x, factors)


def _product_backward(path: Path, tile: int, saved: Any, dy: Array) -> Any:
    if any(f.layout for f in saved[1]) and sharding.gathers():
        saved = jax.lax.optimization_barrier(saved)  # gathers kernels again instead of keeping them
    x, factors = saved
    # Without the barrier XLA computes dy again for each sum over it, instead of reading it.
    dy = jax.lax.optimization_barrier(dy)
    dx = dy @ _effective(tile, x, factors).T
    return dx, _factor_gradients(path, tile, x, factors, dy)


_product.defvjp(_product_forward, _product_backward)


def _factor_gradients(
    path: Path, tile: int, x: Array, factors: Sequence[_Factor], dy: Array
) -> tuple[_Factor, ...]:
    """Returns the gradients of the kernels and of their adapters' arrays, from those of all outputs."""
    arrays = [_replicated(f.arrays, f.method, f.layout) if f.method else {} for f in factors]
    x, widths = x[..., : factors[0].w.shape[0]], _widths(factors, tile)
    # XLA removes what is not used of this product; it is one for all kernels, as in the forward pass.
    dws = jnp.split(outer(x, dy), _ends(widths), axis=-1)
    dws = [dw[:, : f.w.shape[1]].astype(f.w.dtype) for dw, f in zip(dws, factors, strict=True)]
    found: list[Arrays] = [{} for _ in factors]
    together: dict[Any, list[int]] = {}  # kernels of one method and shape
    for i, f in enumerate(factors):
        if f.method and (path == "folded" or not f.method.additive):
            _, vjp = jax.vjp(f.method.weight, arrays[i], f.w)
            found[i], dws[i] = vjp(dws[i])
        elif f.method:
            together.setdefault((f.method, f.w.shape), []).append(i)
    for (method, shape), at in together.items():
        gradients = method.compressed_gradients if path == "compressed" else method.gradients
        dy_BND = _stacked(dy, widths, at)[..., : shape[1]]
        for i, gradient in zip(at, gradients([arrays[i] for i in at], x, dy_BND), strict=True):
            found[i] = gradient
    return tuple(_scattered(f, dw, g) for f, dw, g in zip(factors, dws, found, strict=True))


def _stacked(dy: Array, widths: Sequence[int], at: Sequence[int]) -> Array:
    """Returns the outputs' gradients of some kernels of one width, (..., N, D); no copy if these are all."""
    if len(at) == len(widths):
        return dy.reshape(*dy.shape[:-1], len(at), -1)
    parts = jnp.split(dy, _ends(widths), axis=-1)
    return jnp.stack([parts[i] for i in at], axis=-2)


def _scattered(factor: _Factor, dw: Array, arrays: Arrays) -> _Factor:
    """Returns a factor's gradients, each in the layout of its array."""
    if factor.layout:
        dw = sharding.scattered(dw, factor.layout)
        leaves = factor.method.leaves() if factor.method else {}
        arrays = {name: sharding.scattered(g, leaves[name].layout) for name, g in arrays.items()}
    return dataclasses.replace(factor, w=dw, arrays=arrays)


def _replicated(arrays: Arrays, method: Method, layout: Layout | None) -> Arrays:
    """Returns an adapter's arrays replicated on every device, if there is a mesh."""
    if layout is None:
        return arrays
    leaves = method.leaves()
    return {name: sharding.gathered(a, leaves[name].layout) for name, a in arrays.items()}


def _widths(factors: Sequence[_Factor], tile: int) -> list[int]:
    """Returns the widths of the kernels' outputs, in full tiles."""
    return [f.w.shape[1] + -f.w.shape[1] % tile for f in factors]


def _ends(widths: Sequence[int]) -> list[int]:
    """Returns where to cut what these widths were joined to, for `jnp.split`."""
    return list(itertools.accumulate(widths))[:-1]
