"""A kernel on its way through a program: which of its axes went where, until a product or another use.

Axes are named by their place in the stored kernel. `Kernel.groups` has an entry for each axis that the
program sees: the stored axes that were flattened to it.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from mora_jax.errors import InputError
from mora_jax.methods.base import Adapter, Arrays
from mora_jax.methods.linear import Path, dense
from mora_jax.on import Axes, On
from mora_jax.transform import effective

Groups: TypeAlias = tuple[tuple[int, ...], ...]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["w", "arrays", "key"],
    meta_fields=["on", "name", "path", "groups", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class Kernel:
    """A stored kernel, its adapter, and the form in which the program sees both.

    Attributes:
      w: the stored kernel.
      arrays: the adapter's arrays.
      key: random key of dropout; None for none.
      on: the method, and the roles of w's axes.
      name: the kernel's path, for messages.
      path: how products are computed, as in `dense`.
      groups: for each axis of the program's kernel, the axes of w that it is made of.
      dtype: type of the program's kernel.
    """

    w: Array
    arrays: Arrays
    key: PRNGKeyArray | None
    on: On
    name: str
    path: Path
    groups: Groups
    dtype: Any

    @property
    def axes(self) -> Axes:
        """The roles of the axes of w."""
        return self.on.axes(self.w.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the program's kernel."""
        return tuple(math.prod(self.axes.sizes(group)) for group in self.groups)

    def effective(self, reader: str) -> Array:
        """Returns the effective kernel as the program sees it.

        Args:
          reader: what reads it, for messages.

        Raises:
          InputError: if the update would be rounded away, or dropout cannot be applied.
        """
        if jnp.finfo(self.dtype).bits < 32 and jnp.finfo(self.w.dtype).bits < 32:
            raise InputError(
                f"{self.name} is stored in {self.w.dtype} and read by {reader}, not by a plain product of "
                f"its inputs (of one type, with default precision): adding a small update would round it "
                f"away; store it in float32, or freeze it"
            )
        if self.key is not None and self.on.method.dropout:
            raise InputError(
                f"{self.name} is read by {reader}, not by a product of its inputs, so the dropout of "
                f"{self.on.method.name} cannot apply; set it to 0 for this kernel"
            )
        w = effective(self.on, self.arrays, self.w)
        return jnp.transpose(w, sum(self.groups, ())).reshape(self.shape).astype(self.dtype)

    # What a program may do to a kernel before a product.

    def cast(self, dtype: Any) -> "Kernel | None":
        """Returns the kernel in another floating type, unless it was narrower before: it was rounded then."""
        if not jnp.issubdtype(dtype, jnp.floating):
            return None
        narrower = jnp.finfo(dtype).bits < jnp.finfo(self.dtype).bits
        known = narrower or self.dtype == self.w.dtype
        return dataclasses.replace(self, dtype=dtype) if known else None

    def transposed(self, permutation: Sequence[int]) -> "Kernel":
        """Returns the kernel with its axes in another order."""
        return dataclasses.replace(self, groups=tuple(self.groups[axis] for axis in permutation))

    def reshaped(self, shape: Sequence[int]) -> "Kernel | None":
        """Returns the kernel in another shape, if this flattens axes or undoes that."""
        left, groups = list(sum(self.groups, ())), []
        for width in shape:
            group: list[int] = []
            while left and math.prod(self.axes.sizes(group)) < width:
                group.append(left.pop(0))
            if math.prod(self.axes.sizes(group)) != width:
                return None
            groups.append(tuple(group))
        if left and not groups:
            return None
        return dataclasses.replace(self, groups=(*groups[:-1], groups[-1] + tuple(left)))

    def sliced(self, axis: int, start: Any, width: int) -> "Kernel | None":
        """Returns a part of the kernel along an axis of its stack, with dropout of its own.

        Args:
          axis: axis of the program's kernel.
          start: first index, possibly traced.
          width: number of kernels.
        """
        if len(self.groups[axis]) != 1 or self.groups[axis][0] not in self.axes.stack:
            return None
        at = self.groups[axis][0]
        place = self.axes.stack.index(at)

        def take(array: Array, axis: int) -> Array:
            return jax.lax.dynamic_slice_in_dim(array, start, width, axis)

        arrays = {name: take(array, place) for name, array in self.arrays.items()}
        part = dataclasses.replace(self.keyed(start), w=take(self.w, at), arrays=arrays)
        if width != 1:
            return part
        part = part.without(at)
        return dataclasses.replace(part, w=part.w.squeeze(at), arrays=_squeezed(part.arrays, place))

    def without(self, at: int) -> "Kernel":
        """Returns the kernel whose arrays lost an axis of the stack; the program sees a width of 1."""
        axes = self.axes

        def renamed(old: Sequence[int]) -> tuple[int, ...]:
            return tuple(axis - (axis > at) for axis in old if axis != at)

        on = On(self.on.method, renamed(axes.inputs), renamed(axes.stack))
        return dataclasses.replace(self, on=on, groups=tuple(renamed(group) for group in self.groups))

    def slices(self) -> "Kernel | None":
        """Returns the kernel for a scan, if its first axis is of the stack: each slice is a kernel by itself.

        The arrays have the scanned axis first. Only a slice of them is what the other attributes say.
        """
        first = self.groups[0]
        if len(first) != 1 or first[0] not in self.axes.stack:
            return None
        place = self.axes.stack.index(first[0])
        key = self.key if self.key is None else jax.random.split(self.key, self.w.shape[first[0]])
        arrays = {name: jnp.moveaxis(array, place, 0) for name, array in self.arrays.items()}
        one = self.without(first[0])
        w = jnp.moveaxis(self.w, first[0], 0)
        return dataclasses.replace(one, w=w, arrays=arrays, key=key, groups=one.groups[1:])

    def keyed(self, i: Any) -> "Kernel":
        """Returns the kernel with dropout of its own for the i-th turn of a loop, or layer of a stack."""
        key = self.key if self.key is None else jax.random.fold_in(self.key, i)
        return dataclasses.replace(self, key=key)

    def product(
        self, x: Array, contract: tuple[Sequence[int], Sequence[int]], batch: Any
    ) -> "Product | None":
        """Returns the product of an input with the kernel, if it contracts the inputs of every kernel.

        Args:
          x: the input.
          contract: axes of x, and axes of the program's kernel, that are contracted.
          batch: likewise the axes that both have; only axes of the stack can be.
        """
        axes = self.axes
        contracted = sum((self.groups[axis] for axis in contract[1]), ())
        shared = [self.groups[axis] for axis in batch[1]]
        if sorted(contracted) != sorted(axes.inputs) or any(
            len(group) != 1 or group[0] not in axes.stack for group in shared
        ):
            return None
        shared = [group[0] for group in shared]
        free = [axis for axis in range(x.ndim) if axis not in (*contract[0], *batch[0])]
        # x as (axes of the stack, free axes, inputs in the order of `on`)
        stacked = [batch[0][shared.index(axis)] for axis in axes.stack if axis in shared]
        x = jnp.transpose(x, (*stacked, *free, *contract[0]))
        lead = x.shape[: len(stacked) + len(free)]
        x = x.reshape(*lead, *axes.sizes(contracted))
        order = [len(lead) + contracted.index(axis) for axis in axes.inputs]
        x = jnp.transpose(x, (*range(len(lead)), *order)).reshape(*lead, axes.k)
        y = self._dense(x, [axis in shared for axis in axes.stack])
        y = y.reshape(*y.shape[:-1], *axes.sizes(axes.outputs))
        widths = lead[len(stacked) :]
        return Product(y, (*axes.stack, *(("x", i) for i in range(len(free))), *axes.outputs), widths, shared)

    def _dense(self, x: Array, shared: Sequence[bool]) -> Array:
        """Returns the products of x with every kernel of the stack; `shared` axes are axes of x as well."""
        method, axes = self.on.method, self.axes

        def one(x: Array, w: Array, arrays: Arrays, key: PRNGKeyArray | None) -> Array:
            return dense(x, [w], [Adapter(arrays, method)], self.path, key)[0]

        key = self.key if method.dropout else None
        if key is not None and axes.stack:
            key = jax.random.split(key, axes.sizes(axes.stack))
        for by_x in reversed(shared):
            one = jax.vmap(one, in_axes=(0 if by_x else None, 0, 0, None if key is None else 0))
        return one(x, axes.matrices(self.w), self.arrays, key)


@dataclasses.dataclass(frozen=True)
class Product:
    """A product with labels of its axes: an axis of the kernel, or ("x", i) for the i-th free axis of x."""

    y: Array
    labels: tuple[Any, ...]
    x_widths: tuple[int, ...]
    shared: Sequence[int]

    def arranged(
        self, kernel: Kernel, contracted: Sequence[int], shared: Sequence[int], x_first: bool
    ) -> Array:
        """Returns the product as `lax.dot_general` orders it: shared axes, then those of either operand."""
        groups = [g for i, g in enumerate(kernel.groups) if i not in (*contracted, *shared)]
        of_x = [("x", i) for i in range(len(self.x_widths))]
        of_kernel = [axis for group in groups for axis in group]
        parts = (of_x, of_kernel) if x_first else (of_kernel, of_x)
        order = [self.labels.index(label) for label in (*self.shared, *parts[0], *parts[1])]
        widths = [math.prod(kernel.axes.sizes(group)) for group in groups]
        free = (*self.x_widths, *widths) if x_first else (*widths, *self.x_widths)
        return jnp.transpose(self.y, order).reshape(*kernel.axes.sizes(self.shared), *free)


def _squeezed(arrays: Arrays, axis: int) -> Arrays:
    return {name: array.squeeze(axis) for name, array in arrays.items()}
