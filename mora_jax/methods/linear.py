"""`dense`: kernels and their adapters applied to data, and the gradients of both.

Legend of shapes in names: K inputs, D outputs of a kernel; leading axes of x are batch.
"""

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from mora_jax import sharding
from mora_jax.methods.base import Adapter, Arrays, Method, outer, padded

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
    names: Sequence[str] | None = None,
) -> list[Float[Array, "*B ?D"]]:
    """Applies one or several kernels to one input, in one product, each with an adapter of its own or none.

    Two paths compute `y = x @ weight(arrays, w)` for additive methods. The *merged* path multiplies by the
    effective kernel, added in float32, and needs the adapter's gradient alone in the backward pass: by the
    vjp of `delta` at the saved x (*compressed*), by the vjp of `weight` at the full `x^T dy` (*folded*), or
    as the method finds cheapest. The *activation* path computes `x @ w + delta(arrays, x)`. A base that is
    not float32 always takes the second, since adding a small update to it would round the update away.
    Methods that are not additive always take the first, folded.

    Args:
      x: the input, in the type to compute in. It may be wider than the kernels, with zeros behind.
      ws: kernels (k, d_i), of the stored type.
      adapters: one entry a kernel.
      path: forces a path where there is a choice: "merged", with "compressed" or "folded" gradients if these
        are named, or "activation"; "auto" merges for large batches over a float32 base.
      dropout_key: given in training where a method has dropout, which takes the activation path.
      tile: outputs are widened with zeros to a multiple of this.
      names: the kernels' paths, by which `mora_jax.sharding` knows how they lie on an ambient mesh.

    Returns:
      One output a kernel, in x's type.
    """
    known = tuple(names) if names and sharding.in_use() else (None,) * len(ws)
    keys = _keys(dropout_key, len(ws))
    if len(ws) > 1 and (sharding.divides_products() or all(w.dtype == x.dtype for w in ws)):
        # Kernels that need no cast would be copied only to stand side by side; the parts of those that a mesh
        # divides along their widths would all change places.
        each = zip(ws, adapters, keys, known, strict=True)
        return [y for w, a, key, n in each for y in dense(x, [w], [a], path, key, tile, [n] if n else None)]
    drops = dropout_key is not None and any(a.method.dropout for a in adapters if a)
    tokens = x.size // x.shape[-1]
    wants = merges_float32(tokens, path, [a.method for a in adapters if a])
    merges = wants and not drops and all(w.dtype == jnp.float32 for w in ws)
    inside = [a if a and (merges or not a.method.additive) else None for a in adapters]
    how = How(tuple(a.method if a else None for a in inside), path, tile, known)
    y: Any = _product(how, x, tuple(ws), tuple(dict(a.arrays) if a else {} for a in inside))
    ys = jnp.split(y, _ends(_widths(how, ws)), axis=-1)
    for i, (w, adapter) in enumerate(zip(ws, adapters, strict=True)):
        if adapter and not inside[i]:
            z = _dropped(x[..., : w.shape[0]], adapter.method.dropout, keys[i])
            arrays = _whole(adapter.arrays, known[i])
            ys[i] = ys[i] + padded(adapter.method.delta(arrays, z, w.shape[1]), -1, tile)
    return ys


class How(NamedTuple):
    """What is static of a product: each kernel's method or None, the path, the tile of its outputs, and each
    kernel's name where there is a mesh."""

    methods: tuple[Method | None, ...]
    path: Path
    tile: int
    names: tuple[str | None, ...]


def _whole(arrays: Arrays, name: str | None) -> Arrays:
    """An adapter's arrays on every device, wherever they lie."""
    return {key: sharding.gathered(a, f"{name}/{key}") for key, a in arrays.items()} if name else arrays


def _keys(key: PRNGKeyArray | None, kernels: int) -> list[PRNGKeyArray | None]:
    """One for each kernel, the same whether the kernels share a product or not."""
    if key is None or kernels == 1:
        return [key] * kernels
    return [jax.random.fold_in(key, i) for i in range(kernels)]


def _dropped(x: Array, rate: float, key: PRNGKeyArray | None) -> Array:
    if key is None or not rate:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))


def merges_float32(tokens: float, path: Path, methods: Iterable[Method]) -> bool:
    """Whether adapters of some methods over float32 kernels of one product take the merged path, for so many
    tokens of a batch."""
    if path != "auto":
        return path != "activation"
    return all(tokens >= method.merged_min_tokens for method in methods)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(how: How, x: Array, ws: tuple[Array, ...], arrays: tuple[Arrays, ...]) -> Any:
    """x times the effective kernels, side by side."""
    return x @ _effective(how, x, ws, arrays)


def _effective(how: How, x: Array, ws: Sequence[Array], arrays: Sequence[Arrays]) -> Array:
    """The effective kernels in x's type, with rows of zeros up to x's width, columns up to whole tiles."""
    each = zip(how.methods, ws, arrays, how.names, strict=True)
    merged = [m.weight(_whole(a, name), w) if m else w for m, w, a, name in each]
    cast = [w.astype(x.dtype) for w in merged]
    used = [sharding.gathered(w, name) if name else w for w, name in zip(cast, how.names, strict=True)]
    return jnp.concatenate([padded(padded(w, 0, x.shape[-1]), 1, how.tile) for w in used], axis=-1)


def _product_forward(how: How, x: Array, ws: tuple[Array, ...], arrays: tuple[Arrays, ...]) -> Any:
    # The effective kernels are not saved: making them again costs O(k d), keeping them a copy of the model.
    return _product(how, x, ws, arrays), (x, ws, arrays)


def _product_backward(how: How, saved: Any, dy: Array) -> Any:
    if any(how.names) and sharding.gathers():  # kernels are gathered again, and not kept since the forward
        saved = jax.lax.optimization_barrier(saved)
    x, ws, arrays = saved
    # Without the barrier XLA computes what made dy again for each sum over it, instead of reading dy.
    dy = jax.lax.optimization_barrier(dy)
    dx = dy @ _effective(how, x, ws, arrays).T
    return dx, *_kernel_gradients(how, x, ws, arrays, dy)


_product.defvjp(_product_forward, _product_backward)


def _kernel_gradients(
    how: How, x: Array, ws: Sequence[Array], arrays: Sequence[Arrays], dy: Array
) -> tuple[tuple[Array, ...], tuple[Arrays, ...]]:
    """The gradients of the kernels and of their adapters' arrays, from the gradients of all outputs."""
    arrays = [_whole(a, name) for a, name in zip(arrays, how.names, strict=True)]
    x, widths = x[..., : ws[0].shape[0]], _widths(how, ws)
    # Of this product XLA removes what is not used; it is one for all kernels, as the forward pass is.
    dws = jnp.split(outer(x, dy), _ends(widths), axis=-1)
    dws = [dw[:, : w.shape[1]].astype(w.dtype) for dw, w in zip(dws, ws, strict=True)]
    found: list[Arrays] = [{} for _ in ws]
    for i, (method, w) in enumerate(zip(how.methods, ws, strict=True)):
        if method and _folds(how, method):
            _, vjp = jax.vjp(method.weight, arrays[i], w)
            found[i], dws[i] = vjp(dws[i])
    for at in _alike(how, ws):
        method, own = how.methods[at[0]], [arrays[i] for i in at]
        assert method
        gradients = method.compressed_gradients if how.path == "compressed" else method.gradients
        for i, gradient in zip(at, gradients(own, x, _stacked(dy, widths, at, ws)), strict=True):
            found[i] = gradient
    return tuple(_placed(dw, name) for dw, name in zip(dws, how.names, strict=True)), tuple(
        {key: _placed(g, f"{name}/{key}" if name else None) for key, g in of_one.items()}
        for of_one, name in zip(found, how.names, strict=True)
    )


def _placed(g: Array, name: str | None) -> Array:
    """A gradient where its array lies."""
    return sharding.scattered(g, name) if name else g


def _stacked(dy: Array, widths: Sequence[int], at: Sequence[int], ws: Sequence[Array]) -> Array:
    """The parts of some kernels of one shape, (..., N, D); without a copy where these are all there are."""
    if len(at) == len(widths):
        dy = dy.reshape(*dy.shape[:-1], len(at), -1)
    else:
        parts = jnp.split(dy, _ends(widths), axis=-1)
        dy = jnp.stack([parts[i] for i in at], axis=-2)
    return dy[..., : ws[at[0]].shape[1]]


def _folds(how: How, method: Method) -> bool:
    return how.path == "folded" or not method.additive


def _alike(how: How, ws: Sequence[Array]) -> list[list[int]]:
    """The kernels whose adapters' gradients are taken together: those of one method and shape."""
    groups: dict[Any, list[int]] = {}
    for i, (method, w) in enumerate(zip(how.methods, ws, strict=True)):
        if method and not _folds(how, method):
            groups.setdefault((method, w.shape), []).append(i)
    return list(groups.values())


def _widths(how: How, ws: Sequence[Array]) -> list[int]:
    """The widths of the kernels' outputs, in whole tiles."""
    return [w.shape[1] + -w.shape[1] % how.tile for w in ws]


def _ends(widths: Sequence[int]) -> list[int]:
    """Where to cut what these widths were joined to, for `jnp.split`."""
    return list(itertools.accumulate(widths))[:-1]
