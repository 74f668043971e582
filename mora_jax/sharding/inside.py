"""Constraints inside jit: what the model and its adapters say about an ambient mesh."""

import collections
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array

from mora_jax.sharding.rules import (
    AXES,
    BATCH,
    Layout,
    Rules,
    Sizes,
    canonical,
    divides,
    names,
    spec,
    spec_at,
    used,
)


def pin(tree: Any, rules: Rules) -> Any:
    """Returns a tree with every leaf constrained to the layout that the rules give its path."""
    sizes = _ambient()
    if not sizes:
        return tree

    def constrain_leaf(path: Any, x: Array) -> Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return jax.lax.with_sharding_constraint(x, spec_at(name, x.shape, sizes, rules))

    return jax.tree_util.tree_map_with_path(constrain_leaf, tree)


def constrain(x: Array, layout: Layout) -> Array:
    """Returns an activation constrained to a layout, or unconstrained if no choice divides it."""
    sizes = _ambient()
    for choice in layout.choices if sizes else ():
        if divides(choice, x.shape, sizes):
            return jax.lax.with_sharding_constraint(x, canonical(choice, x.ndim, sizes))
    return x


def by_device(function: Callable[..., Any], inputs: tuple[Layout, ...], output: Layout) -> Callable[..., Any]:
    """Returns a function that each device applies to its own shards of arrays in these layouts."""
    sizes = _ambient()
    if not sizes:
        return function
    *in_specs, out_specs = (canonical(layout.choices[0], 0, sizes) for layout in (*inputs, output))
    return jax.shard_map(function, in_specs=tuple(in_specs), out_specs=out_specs, check_vma=False)


def one_by_one(function: Callable[..., Any], *stacks: Any) -> Any:
    """Applies a function to each entry of stacks, one after another, and shares the entries out to devices.

    For what the compiler cannot divide, such as decompositions: each device would compute all of them.
    """

    def local(*stacks: Any) -> Any:
        return jax.lax.map(lambda entry: function(*entry), stacks)

    sizes = _ambient()
    if not sizes:
        return local(*stacks)
    count = len(jax.tree.leaves(stacks)[0])
    missing = -count % math.prod(sizes.values())
    filled = jax.tree.map(lambda a: jnp.pad(a, [(0, missing), *[(0, 0)] * (a.ndim - 1)]), stacks)
    divided = P(tuple(sizes))
    found = jax.shard_map(local, in_specs=divided, out_specs=divided, check_vma=False)(*filled)
    # Replicated once: XLA would do so for each entry that is cut out of a divided stack.
    return jax.tree.map(lambda a: undivided(a)[:count], found)


def by_matrix(
    function: Callable[[Array], Array], matrices: Mapping[str, Array], rules: Rules
) -> dict[str, Array]:
    """Applies a function of stacks (N, K, D) to all matrices, where each device takes some of them whole.

    For what needs complete matrices: devices exchange the parts that they hold, and the results, once. No
    device computes what another does, but for those that hold the same parts, and for undivided matrices.

    Args:
      function: of a stack, for each matrix by itself, to one of the same shape. It maps zeros to zeros.
      matrices: arrays (..., K, D) by path.
      rules: how they may be divided.

    Returns:
      The results by path.
    """
    sizes, alike, results = _ambient(), collections.defaultdict(list), {}
    for path, array in matrices.items():
        shape = array.shape[-2:]
        stored = spec_at(path, shape, sizes, rules) if sizes else P()
        alike[shape, stored, array.dtype].append(path)
    for (shape, stored, _), paths in alike.items():
        if stored == P():
            results |= {path: function(matrices[path]) for path in paths}
            continue
        stacks = [matrices[path].reshape(-1, *shape) for path in paths]
        ends = itertools.accumulate(len(stack) for stack in stacks)
        found = jnp.split(_exchanged(function, jnp.concatenate(stacks), stored, sizes), list(ends)[:-1])
        results |= {path: part.reshape(matrices[path].shape) for path, part in zip(paths, found, strict=True)}
    return results


def _exchanged(function: Callable[[Array], Array], stack: Array, stored: P, sizes: Sizes) -> Array:
    """Applies a function to a stack (N, K, D) of divided matrices; each of n devices takes N / n of them."""
    # Of two mesh axes that divide an axis, the second one divides it further.
    ways = [(name, axis) for axis, entry in enumerate(stored, 1) for name in reversed(names(entry))]

    def local(stack: Array) -> Array:
        for name, axis in ways:
            stack = jax.lax.all_to_all(stack, name, 0, axis, tiled=True)
        stack = function(stack)
        for name, axis in reversed(ways):
            stack = jax.lax.all_to_all(stack, name, axis, 0, tiled=True)
        return stack

    count, divided = len(stack), P(None, *stored)
    stack = jnp.pad(stack, [(0, -count % math.prod(sizes[name] for name, _ in ways)), (0, 0), (0, 0)])
    return jax.shard_map(local, in_specs=divided, out_specs=divided, check_vma=False)(stack)[:count]


def whole(x: Array) -> Array:
    """Returns an activation (batch, ..., width) divided along its batch only."""
    sizes = _ambient()
    if not sizes or x.shape[0] % math.prod(sizes[axis] for axis in BATCH):
        return x
    return jax.lax.with_sharding_constraint(x, canonical(P(BATCH), 1, sizes))


def joined(x: Array, parts: Layout) -> Array:
    """Returns an activation that is in parts between products, complete, for a product that `tensor` divides.

    Its gradient is summed over devices into the parts, of which each device keeps its own.
    """
    return _joined(x, parts) if divides_products() else x


def parted(y: Array, parts: Layout) -> Array:
    """Returns what devices sum of a product that `tensor` divides, in parts; its gradient is `joined`."""
    return _parted(y, parts) if divides_products() else y


def by_batch(x: Array, widths: int = 1) -> Array:
    """Returns an activation (batch, ..., width) divided along its batch, and its widths as XLA likes."""
    sizes = _ambient()
    if not divides_products() or x.shape[0] % math.prod(sizes[axis] for axis in BATCH):
        return whole(x)
    between = (None,) * (x.ndim - 1 - widths)
    return jax.lax.with_sharding_constraint(x, P(_rows(x), *between, *(P.UNCONSTRAINED,) * widths))


def by_width(function: Callable[[Array], Any], x: Array, axis: int, width: int) -> Any:
    """Applies a linear function to each device's part of a width, as if the others were zero.

    So nothing is sent, where a function of the complete width would need all parts. XLA does not make the
    zeros where it fuses the function.

    Args:
      function: linear, of an array with the complete width, to arrays that keep the first axis.
      x: an activation (batch, ...) or products (G, ...) in parts of the batch, divided along that axis and,
        over `tensor`, along the width.
      axis: where the width is.
      width: the complete width. x may be wider, padded with zeros.

    Returns:
      Parts (tensor, batch, ...), whose sum is `function(x)`. Each device has its own.
    """
    sizes = _ambient()
    count = sizes["tensor"]
    x, rows = jnp.pad(x, [(0, -n % count if at == axis else 0) for at, n in enumerate(x.shape)]), _rows(x)

    def local(part: Array) -> Any:
        complete = jnp.zeros([n * count if at == axis else n for at, n in enumerate(part.shape)], part.dtype)
        start = jax.lax.axis_index("tensor") * part.shape[axis]
        complete = jax.lax.dynamic_update_slice_in_dim(complete, part, start, axis)
        found = function(jax.lax.slice_in_dim(complete, 0, width, axis=axis))
        return jax.tree.map(lambda a: a[None], found)

    return jax.shard_map(
        local, in_specs=_stack(axis + 1, rows), out_specs=P("tensor", rows), check_vma=False
    )(x)


def one_each(parts: Array) -> Array:
    """Returns parts (devices, ...), of which each device keeps its own: else XLA may sum them too early."""
    sizes, over = _ambient(), ("tensor", *BATCH)
    if not sizes or len(parts) != math.prod(sizes[axis] for axis in over):
        return parts
    return jax.lax.with_sharding_constraint(parts, canonical(P(over), 1, sizes))


def unstacked(y: Array) -> list[Array]:
    """Returns y[..., i, :] of a stack (batch, ..., N, width) for each i, where `tensor` divides the width.

    A device has its parts of them side by side, and cuts them apart as it does without a mesh: XLA makes
    other kernels of a stack.
    """
    count, rows = y.shape[-2], _rows(y) if y.ndim > 2 else None
    if rows is None and batch_shards() > 1:  # devices would sum gradients that all of them have
        return [y[..., i, :] for i in range(count)]

    def local(part: Array) -> tuple[Array, ...]:
        return tuple(jnp.split(part.reshape(*part.shape[:-2], -1), count, axis=-1))

    stack, divided = _stack(y.ndim, rows), _stack(y.ndim - 1, rows)
    return list(jax.shard_map(local, in_specs=stack, out_specs=divided, check_vma=False)(y))


def flat(y: Array) -> Array:
    """Returns a stack (batch, ..., N, width), whose width `tensor` divides, as (batch, ..., N width).

    Nothing is sent: each device has its parts of the N arrays side by side. `unflat` is the inverse.
    """
    return _reshaped(y, lambda part: part.reshape(*part.shape[:-2], -1), y.ndim - 1)


def unflat(y: Array, count: int) -> Array:
    """Returns what `flat` made of a stack of `count` arrays as the stack again."""
    return _reshaped(y, lambda part: part.reshape(*part.shape[:-1], count, -1), y.ndim + 1)


def undivided(x: Array) -> Array:
    """Returns an array replicated on every device."""
    return jax.lax.with_sharding_constraint(x, P()) if _ambient() else x


def gathered(w: Array, layout: Layout, sent: DTypeLike | None = None) -> Array:
    """Returns a parameter's or adapter's array as products need it, no longer divided over `fsdp`.

    Its gradient, in its own type, is scattered back to its layout.

    Args:
      w: the array.
      layout: how it may be divided.
      sent: type in which it is all-gathered, and rounded to; by default its own.
    """
    return _gathered(w, layout, sent if gathers() else None) if _ambient() else w


def scattered(g: Array, layout: Layout) -> Array:
    """Returns a gradient in the layout of its array, as the optimizer needs it.

    The gradient is summed in the layout of use first: asked for the shards alone, XLA would rather move the
    activations.
    """
    sizes = _ambient()
    if not sizes:
        return g
    for target in (used(layout, g.shape, sizes), spec(layout, g.shape, sizes)):
        g = jax.lax.with_sharding_constraint(g, target)
    return g


def summed(parts: Array, sent: DTypeLike) -> Array:
    """Returns the sum of a gradient's parts (G, ...), of which each device computed one.

    It is in the type that is sent: XLA makes no reduce-scatter of a sum that is widened before `scattered`.

    Args:
      parts: one for each shard of the batch, and of a divided width. A single one, as of rows that do not
        divide among shards, is returned as it is.
      sent: type in which devices send each other parts, and sums of parts. They are rounded to it.
    """
    if len(parts) == 1:
        return parts[0]
    # `jnp.sum` would add in float32, and send that.
    return jax.lax.reduce(parts.astype(sent), jnp.zeros((), sent), jax.lax.add, (0,))


def batch_shards(mesh: Any = None) -> int:
    """Returns the number of shards of a batch on a mesh, by default on the ambient one."""
    sizes = _ambient() if mesh is None else mesh.shape
    return math.prod(sizes[axis] for axis in BATCH) if sizes else 1


def tensor_shards() -> int:
    """Returns the number of parts of a width that `tensor` divides, on the ambient mesh."""
    sizes = _ambient()
    return sizes["tensor"] if sizes else 1


def in_use() -> bool:
    """Returns whether there is an ambient mesh with our axes and more than one device."""
    return bool(_ambient())


def divides_products() -> bool:
    """Returns whether kernels are divided along their widths, so that they are stacked, not joined."""
    return tensor_shards() > 1


def divided(layout: Layout | None) -> tuple[bool, bool]:
    """Returns whether `tensor` divides the inputs and the outputs of a kernel while products use it."""
    if layout is None or not divides_products():
        return False, False
    inputs, outputs = ("tensor" in names(axis) for axis in (None, None, *layout.used)[-2:])
    return inputs, outputs


def stored_in_parts(layout: Layout | None, shape: Sequence[int]) -> tuple[bool, ...]:
    """Returns for each axis of an array whether the mesh divides it while no product uses it."""
    sizes = _ambient()
    stored = spec(layout, shape, sizes) if sizes and layout else P()
    return tuple(axis is not None for axis in (*stored, *[None] * (len(shape) - len(stored))))


def tile(width: int, whole: int) -> int:
    """Returns the tile that a width is padded to: `whole`, or 1 if `tensor` divides the width."""
    sizes = _ambient()
    return 1 if sizes and sizes["tensor"] > 1 and width % sizes["tensor"] == 0 else whole


def gathers() -> bool:
    """Returns whether parameters are all-gathered for their use, so that the copies should not be kept."""
    sizes = _ambient()
    return bool(sizes) and sizes["fsdp"] > 1


def device_kind() -> str:
    """Returns the kind of the devices compiled for, such as "NVIDIA H100 80GB HBM3"; "" if not known.

    The ambient mesh decides, so a plan for devices that are not here never sees those of the host.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device is not None else ""


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(w: Array, layout: Layout, sent: DTypeLike | None) -> Array:
    sizes, stored_type = _ambient(), w.dtype
    w = w.astype(sent or stored_type)
    for target in (spec(layout, w.shape, sizes), used(layout, w.shape, sizes)):
        w = jax.lax.with_sharding_constraint(w, target)
    return w.astype(stored_type)


def _gathered_forward(w: Array, layout: Layout, sent: DTypeLike | None) -> tuple[Array, None]:
    return _gathered(w, layout, sent), None


def _gathered_backward(layout: Layout, sent: DTypeLike | None, _: None, g: Array) -> tuple[Array]:
    return (scattered(g, layout),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _joined(x: Array, parts: Layout) -> Array:
    # Without the barrier XLA would send what is to be rounded to x's type before it is.
    return whole(jax.lax.optimization_barrier(constrain(x, parts)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _parted(y: Array, parts: Layout) -> Array:
    return constrain(y, parts)


_joined.defvjp(lambda x, parts: (_joined(x, parts), None), lambda parts, _, g: (_parted(g, parts),))
_parted.defvjp(lambda y, parts: (_parted(y, parts), None), lambda parts, _, g: (_joined(g, parts),))


def _reshaped(y: Array, local: Callable[[Array], Array], ndim: int) -> Array:
    """Returns what each device makes of its part of an activation whose last axis `tensor` divides."""
    rows = _rows(y) if min(y.ndim, ndim) > 1 else None
    specs = _stack(y.ndim, rows), _stack(ndim, rows)
    return jax.shard_map(local, in_specs=specs[0], out_specs=specs[1], check_vma=False)(y)


def _stack(ndim: int, rows: Any) -> P:
    """Returns the spec of an activation that rows divide along its first axis and `tensor` along its last."""
    return P(rows, *[None] * (ndim - 2), "tensor") if ndim > 1 else P("tensor")


def _rows(x: Array) -> Any:
    """Returns what divides the first axis of an activation, None if the mesh does not divide it."""
    sizes = _ambient()
    first, *_ = (*canonical(P(BATCH), 1, sizes), None)
    return None if x.shape[0] % math.prod(sizes[axis] for axis in BATCH) else first


def _ambient() -> Sizes:
    """Returns the sizes of the ambient mesh's axes; empty if it has other axes, or axes not automatic."""
    mesh = jax.sharding.get_abstract_mesh()
    ours = not mesh.empty and set(AXES) <= set(mesh.auto_axes)
    return mesh.shape if ours and mesh.size > 1 else {}
