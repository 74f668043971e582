"""`dense`: kernels and their adapters applied to one input, and the gradients of both.

Legend of shapes in names: K inputs, D outputs of a kernel; leading axes of x are batch.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from mora_jax import sharding
from mora_jax.errors import InputError
from mora_jax.methods.base import Adapter, Arrays, Bound, Method, outer_by_parts, outers_by_parts, padded
from mora_jax.sharding import Layout

Path: TypeAlias = Literal["auto", "merged", "compressed", "folded", "activation"]

# Matrix units work in tiles of this width: 32768 x 2048 x 5461 runs at a third of the speed of x 5504.
TILE = 128

_STACK = Layout((P(None, None, "tensor"),))  # kernels (K, N, D) whose widths `tensor` divides


def dense(
    x: Float[Array, "*B K"],
    ws: Sequence[Float[Array, "K ?D"] | Bound],
    adapters: Sequence[Adapter | None] | None = None,
    path: Path = "auto",
    dropout_key: PRNGKeyArray | None = None,
    tile: int = 1,
    layouts: Sequence[Layout] | None = None,
    keep: bool = False,
    sums: DTypeLike = jnp.float32,
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
      ws: kernels (k, d_i), in the stored type, or as `bind` joins them to their adapters.
      adapters: one entry for each kernel. Without it, the bound kernels have adapters and the others none.
      path: forces a path where there is a choice: "merged", the same with "compressed" or "folded" gradients,
        or "activation". "auto" merges for large batches over a float32 base.
      dropout_key: random key of a training step whose methods have dropout, which takes the activation path.
      tile: outputs are padded with zeros to a multiple of this.
      layouts: how each kernel may be divided over an ambient mesh. Without it, XLA decides.
      keep: whether kernels that devices of a mesh send each other are kept for the backward pass; otherwise
        they are sent again.
      sums: type in which devices of a mesh send each other their parts of gradients.

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
    if adapters is None:
        adapters = [w.adapter if isinstance(w, Bound) else None for w in ws]
    for w in ws:
        if isinstance(w, Bound) and w.w.ndim != 2:
            raise InputError(
                f"{w.path} is a stack of kernels {w.w.shape}: scan over it, or index a layer of it"
            )
    ws = [w.w if isinstance(w, Bound) else w for w in ws]
    known = list(layouts) if layouts and sharding.in_use() else [None] * len(ws)
    # Each kernel draws the same dropout mask whether the kernels share a product or not.
    keys: Sequence[PRNGKeyArray | None] = [dropout_key] * len(ws)
    if dropout_key is not None and len(ws) > 1:
        keys = [jax.random.fold_in(dropout_key, i) for i in range(len(ws))]
    kernels = [_Kernel(*parts) for parts in zip(ws, adapters, known, keys, strict=True)]
    how = _How(path, tile, keep, jnp.dtype(sums))
    if all(w.dtype == x.dtype for w in ws) or (sharding.divides_products() and not _stacks(kernels, tile)):
        # Kernels that need no cast would be copied just to be joined.
        return [y for kernel in kernels for y in _applied(x, [kernel], how)]
    return _applied(x, kernels, how)


@dataclasses.dataclass(frozen=True)
class _How:
    """How kernels are applied, as `dense` takes it."""

    path: Path
    tile: int
    keep: bool
    sums: jnp.dtype


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """One kernel as `dense` takes it."""

    w: Array
    adapter: Adapter | None
    layout: Layout | None
    dropout_key: PRNGKeyArray | None


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["ws", "arrays"], meta_fields=["methods", "layouts"]
)
@dataclasses.dataclass(frozen=True)
class _Factors:
    """The kernels of one product, an entry for each; their gradients have the same form.

    Attributes:
      ws: the stored kernels.
      arrays: arrays of the adapters that are merged into them; empty for a kernel without one.
      methods: methods of these adapters.
      layouts: how the kernels lie on an ambient mesh; None if there is none.
    """

    ws: tuple[Array, ...]
    arrays: tuple[Arrays, ...]
    methods: tuple[Method | None, ...]
    layouts: tuple[Layout | None, ...]

    def __iter__(self) -> Iterator[tuple[Array, Arrays, Method | None, Layout | None]]:
        return zip(self.ws, self.arrays, self.methods, self.layouts, strict=True)


def _stacks(kernels: Sequence[_Kernel], tile: int) -> bool:
    """Returns whether kernels can be stacked over `tensor`: they are alike, and it divides their width."""
    first, *others = kernels
    width = first.w.shape[1] + -first.w.shape[1] % tile
    alike = all(k.w.shape == first.w.shape and k.layout == first.layout for k in others)
    return alike and sharding.divided(first.layout)[1] and width % sharding.tensor_shards() == 0


def _applied(x: Array, kernels: Sequence[_Kernel], how: _How) -> list[Array]:
    merged = _merged(x, kernels, how.path)
    inside = [k.adapter if is_merged else None for k, is_merged in zip(kernels, merged, strict=True)]
    factors = _Factors(
        tuple(k.w for k in kernels),
        tuple(dict(adapter.arrays) if adapter else {} for adapter in inside),
        tuple(adapter.method if adapter else None for adapter in inside),
        tuple(k.layout for k in kernels),
    )
    y: Any = _product(how, x, factors)
    ys = _apart(y, _widths(factors, how.tile), y.ndim > x.ndim)
    return [
        y + padded(_delta(x, k), -1, how.tile) if k.adapter and not is_merged else y
        for y, k, is_merged in zip(ys, kernels, merged, strict=True)
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(how: _How, x: Array, factors: _Factors) -> Any:
    """Returns x times the effective kernels, side by side or stacked, as these are."""
    return _times(x, _effective(how.tile, x, factors))


def _times(x: Array, w: Array) -> Array:
    """Returns x @ w as a product of matrices, within which cuBLAS can add another matrix.

    What devices sum over `tensor` they may keep by positions, which a matrix of all tokens does not show.
    """
    if sharding.divides_products():
        return jnp.tensordot(x, w, 1)
    return (x.reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:-1], w.shape[-1])


def _effective(tile: int, x: Array, factors: _Factors) -> Array:
    """Returns the effective kernels in x's type, rows padded to x's width and columns to full tiles.

    They are side by side, (K, columns), or stacked, (K, N, D), where `tensor` divides their widths: so each
    device has its parts of all kernels side by side.
    """
    merged = [
        method.weight(_replicated(arrays, method, layout), _widened(w)) if method else w
        for w, arrays, method, layout in factors
    ]
    return _placed_together([w.astype(x.dtype) for w in merged], factors.layouts, x.shape[-1], tile)


def _placed_together(ws: Sequence[Array], layouts: Sequence[Layout | None], rows: int, tile: int) -> Array:
    """Returns kernels as `_effective` does, padded to `rows` and full tiles.

    On a mesh, kernels side by side that are stored alike are all-gathered in one piece. Axes that are not
    divided are padded, and these kernels joined, before that.
    """
    divided = [sharding.stored_in_parts(at, w.shape) for w, at in zip(ws, layouts, strict=True)]
    ws = [
        padded(w if rows_divided else padded(w, 0, rows), 1, 1 if columns_divided else tile)
        for w, (rows_divided, columns_divided) in zip(ws, divided, strict=True)
    ]
    stacks = sharding.divides_products() and len(ws) > 1
    if set(divided) == {(True, False)} and len(set(layouts)) == 1 and not stacks:
        ws, layouts = [jnp.concatenate(ws, axis=-1)], layouts[:1]
    used = [sharding.gathered(w, at) if at else w for w, at in zip(ws, layouts, strict=True)]
    used = [padded(padded(w, 0, rows), 1, tile) for w in used]
    return sharding.constrain(jnp.stack(used, axis=1), _STACK) if stacks else jnp.concatenate(used, axis=-1)


def _widened(w: Array) -> Array:
    """Returns a kernel in float32 or its wider type: a method's update would be rounded in a narrower one."""
    return w.astype(jnp.promote_types(w.dtype, jnp.float32))


def _product_forward(how: _How, x: Array, factors: _Factors) -> Any:
    # The effective kernels are not saved: recomputing costs O(k d), saving would cost a copy of the model.
    # But XLA merges no two collectives, so kernels that devices send each other are saved to send them once.
    # Over `tensor` some are not sent; XLA would keep these as well.
    sent = any(factors.layouts) and (sharding.gathers() or sharding.divides_products())
    w = _effective(how.tile, x, factors)
    kept = w if sent and how.keep else None
    return _times(x, w), (x, factors, kept)  # plain, so that it has a forward mode


def _product_backward(how: _How, saved: Any, dy: Array) -> Any:
    x, factors, w = saved
    if w is None and any(factors.layouts) and sharding.gathers():
        x, factors = jax.lax.optimization_barrier((x, factors))  # gathers kernels again
    w = _effective(how.tile, x, factors) if w is None else w
    # Without the barrier XLA computes dy again for each sum over it, instead of reading it.
    dy = jax.lax.optimization_barrier(dy)
    dx = jnp.einsum("...nd,knd->...k", dy, w) if w.ndim > 2 else dy @ w.T
    return dx, _factor_gradients(how, x, factors, dy)


_product.defvjp(_product_forward, _product_backward)


def _factor_gradients(how: _How, x: Array, factors: _Factors, dy: Array) -> _Factors:
    """Returns the gradients of the kernels and of their adapters' arrays, from those of all outputs."""
    arrays = [_replicated(a, method, layout) if method else {} for _, a, method, layout in factors]
    x_wide, x, widths = x, x[..., : factors.ws[0].shape[0]], _widths(factors, how.tile)
    stacked = dy.ndim > x.ndim
    summed = functools.partial(sharding.summed, sent=how.sums)
    # XLA removes what is not used of this product; it is one for all kernels, as in the forward pass.
    dws = _apart(outers_by_parts(x, dy, True) if stacked else outer_by_parts(x, dy), widths, stacked)
    dws = [summed(dw[..., : w.shape[1]]) for dw, w in zip(dws, factors.ws, strict=True)]
    found: list[Arrays] = [{} for _ in dws]
    together: dict[Any, list[int]] = {}  # kernels of one method and shape
    for i, (w, _, method, _) in enumerate(factors):
        if method and (how.path == "folded" or not method.additive):
            _, vjp = jax.vjp(method.weight, arrays[i], _widened(w))
            found[i], dws[i] = vjp(dws[i].astype(_widened(w).dtype))
        elif method:
            together.setdefault((method, w.shape), []).append(i)
    for (method, (k, d)), at in together.items():
        of, dy_BND = [arrays[i] for i in at], _stacked(dy, widths, at, stacked)
        if how.path == "compressed":
            gradients = method.compressed_gradients(of, x, dy_BND[..., :d])
        else:  # cutting the padding of what is divided would move all parts
            cut_k, cut_d = sharding.divided(factors.layouts[at[0]])
            inputs, outputs = x_wide if cut_k else x, dy_BND if cut_d else dy_BND[..., :d]
            gradients = method.gradients(of, inputs, outputs, (k * cut_k, d * cut_d))
        for i, gradient in zip(at, gradients, strict=True):
            found[i] = {name: summed(g) for name, g in gradient.items()}
    return _scattered(factors, dws, found)


def _apart(y: Array, widths: Sequence[int], stacked: bool) -> list[Array]:
    """Returns what belongs to each kernel, whether the kernels are stacked or side by side."""
    if stacked:
        return sharding.unstacked(y)
    return jnp.split(y, list(itertools.accumulate(widths))[:-1], axis=-1)


def _stacked(dy: Array, widths: Sequence[int], at: Sequence[int], stacked: bool) -> Array:
    """Returns the outputs' gradients of some kernels of one width, (..., N, D); no copy if these are all."""
    if len(at) == len(widths):
        return dy if stacked else dy.reshape(*dy.shape[:-1], len(at), -1)
    parts = _apart(dy, widths, stacked)
    return jnp.stack([parts[i] for i in at], axis=-2)


def _scattered(factors: _Factors, dws: Sequence[Array], arrays: Sequence[Arrays]) -> _Factors:
    """Returns the gradients, each in the layout and the type of its array."""
    placed_ws, placed_arrays = list(dws), list(arrays)
    for i, (_, _, method, layout) in enumerate(factors):
        if layout:
            leaves = method.leaves() if method else {}
            placed_ws[i] = sharding.scattered(dws[i], layout)
            placed_arrays[i] = {n: sharding.scattered(g, leaves[n].layout) for n, g in arrays[i].items()}
    placed = dataclasses.replace(factors, ws=tuple(placed_ws), arrays=tuple(placed_arrays))

    def typed(g: Array, array: Array) -> Array:  # an array of integers has no gradient
        return g if g.dtype == jax.dtypes.float0 else g.astype(array.dtype)

    return jax.tree.map(typed, placed, factors)


def _replicated(arrays: Arrays, method: Method, layout: Layout | None) -> Arrays:
    """Returns an adapter's arrays replicated on every device, if there is a mesh."""
    if layout is None:
        return arrays
    leaves = method.leaves()
    return {name: sharding.gathered(a, leaves[name].layout) for name, a in arrays.items()}


def _widths(factors: _Factors, tile: int) -> list[int]:
    """Returns the widths of the kernels' outputs, in full tiles."""
    return [w.shape[1] + -w.shape[1] % tile for w in factors.ws]
