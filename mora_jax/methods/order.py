"""Orders of an axis: permutations without a gather, by which a restart spreads an update over other places.

Legend of shapes in names: N rows, S the stride.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

LARGEST_STRIDE = 12


@dataclasses.dataclass(frozen=True)
class Order:
    """The places of an axis, rolled and then read with a stride: 0, s, 2 s, ..., 1, s + 1, ...

    Attributes:
      stride: the stride s, at least 1; at most the width is used.
      shift: by how much the axis is rolled to the right, as a fraction of its width in [0, 1).
    """

    stride: int = 1
    shift: float = 0.0

    def __call__(self, x: Array, axis: int) -> Array:
        """Returns x with its axis in this order."""
        width = x.shape[axis]
        x = jnp.roll(x, self._places(width), axis)
        rows, stride, full = self._rows(width)
        if stride == 1:
            return x
        x = jnp.pad(x, _at(axis, x.ndim, rows * stride - width))
        x = x.reshape(*x.shape[:axis], rows, stride, *x.shape[axis + 1 :])
        long = lax.slice_in_dim(x, 0, full, axis=axis + 1)
        short = lax.slice_in_dim(lax.slice_in_dim(x, full, stride, axis=axis + 1), 0, rows - 1, axis=axis)
        return jnp.concatenate([_columns(long, axis), _columns(short, axis)], axis)

    def back(self, y: Array, axis: int) -> Array:
        """Returns what this order takes to y: the inverse."""
        width = y.shape[axis]
        rows, stride, full = self._rows(width)
        if stride > 1:
            long = _split(lax.slice_in_dim(y, 0, full * rows, axis=axis), axis, full, rows)
            short = _split(lax.slice_in_dim(y, full * rows, width, axis=axis), axis, stride - full, rows - 1)
            short = jnp.pad(short, _at(axis, y.ndim + 1, 1))
            y = jnp.concatenate([long, short], axis + 1)
            y = y.reshape(*y.shape[:axis], rows * stride, *y.shape[axis + 2 :])
            y = lax.slice_in_dim(y, 0, width, axis=axis)
        return jnp.roll(y, -self._places(width), axis)

    def _places(self, width: int) -> int:
        return int(self.shift * width)

    def _rows(self, width: int) -> tuple[int, int, int]:
        """Returns the rows of the axis cut into rows of the stride, the stride, and the full columns."""
        stride = min(self.stride, width)
        rows = -(-width // stride)
        return rows, stride, width - (rows - 1) * stride


def drawn(seed: int, number: int) -> tuple[Order, Order]:
    """Returns the orders of inputs and outputs that a seed draws the `number`-th time.

    Example:
      >>> from mora_jax.methods.order import drawn
      >>> drawn(0, 1) == drawn(0, 1), drawn(0, 1) == drawn(0, 2)
      (True, False)
    """
    # NumPy promises that these numbers stay the same in all versions, which it does not of its generators.
    words = np.random.SeedSequence([seed, number]).generate_state(4, np.uint32).tolist()
    orders = [Order(1 + s % LARGEST_STRIDE, b / 2**32) for s, b in (words[:2], words[2:])]
    return orders[0], orders[1]


def _at(axis: int, ndim: int, missing: int) -> list[tuple[int, int]]:
    return [(0, missing) if a == axis else (0, 0) for a in range(ndim)]


def _columns(x: Array, axis: int) -> Array:
    """Returns the columns of rows (axis, axis + 1), one after another."""
    x = x.swapaxes(axis, axis + 1)
    return x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])


def _split(y: Array, axis: int, columns: int, rows: int) -> Array:
    """Returns the rows whose columns are joined: the inverse of `_columns`."""
    return y.reshape(*y.shape[:axis], columns, rows, *y.shape[axis + 1 :]).swapaxes(axis, axis + 1)
