"""MoRA's operators: how a width is compressed to r_hat, and r_hat decompressed to a width.

All are linear, hold no parameters, and act on the last axis. Besides the two directions each gives `matrix`,
the dense update that they make of M: `decompress(compress(x) @ m) == x @ matrix(m)`, in O(k d) work.

Legend of shapes in names: K inputs (k in the paper), D outputs (d), R the side of M (r_hat).
"""

import dataclasses
from typing import ClassVar, Literal, TypeAlias

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mora_jax.errors import InputError

Group: TypeAlias = Literal[0, 1]


class Operator:
    """One way to compress and decompress; subclasses are frozen dataclasses."""

    name: ClassVar[str]
    multiple: ClassVar[int] = 1  # r_hat is a multiple of this

    def compress(self, x: Float[Array, "*B K"], r_hat: int) -> Float[Array, "*B R"]:
        """f_comp: the inputs to M."""
        raise NotImplementedError

    def decompress(self, y: Float[Array, "*B R"], d: int) -> Float[Array, "*B D"]:
        """f_decomp: M's outputs to the width d."""
        raise NotImplementedError

    def matrix(self, m_RR: Float[Array, "R R"], k: int, d: int) -> Float[Array, "K D"]:
        """The update that M stands for, in the orientation of a kernel: (inputs, outputs)."""
        raise NotImplementedError

    def switched(self) -> "Operator":
        """The operator after a restart; the same where there is no other pattern."""
        return self


@dataclasses.dataclass(frozen=True)
class Share(Operator):
    """Sharing (Eq. 6 and 7): dW[i, j] = M[g_out(i), g_in(j)], groups of inputs and outputs share a row of M.

    Attributes:
      group: group type 0 is strided, g(j) = j mod r_hat; type 1 is contiguous, r_hat runs of neighbours whose
        lengths differ by at most one. A pair gives the types of input and output.
      pad: where r_hat does not divide the number of inputs, "zero" leaves each input in exactly one group
        (Eq. 7); "wrap" appends the first inputs again, as the authors' code does. Only for strided inputs.
    """

    group: Group | tuple[Group, Group] = 0
    pad: Literal["zero", "wrap"] = "zero"
    name: ClassVar[str] = "share"

    def __post_init__(self) -> None:
        group = tuple(self.group) if isinstance(self.group, list | tuple) else self.group
        object.__setattr__(self, "group", group)
        if group not in (0, 1) and not (
            isinstance(group, tuple) and len(group) == 2 and all(g in (0, 1) for g in group)
        ):
            raise InputError(f"share's group type is 0, 1 or a pair of them (input, output), not {group!r}")
        if self.pad not in ("zero", "wrap"):
            raise InputError(f"share's pad is 'zero' or 'wrap', not {self.pad!r}")

    @property
    def groups(self) -> tuple[Group, Group]:
        """The group types of (input, output)."""
        return self.group if isinstance(self.group, tuple) else (self.group, self.group)

    def switched(self) -> "Share":
        """The same operator with the other group type: the pattern after a restart."""
        g_in, g_out = self.groups
        return dataclasses.replace(self, group=(1 - g_in, 1 - g_out) if g_in != g_out else 1 - g_in)

    def compress(self, x: Float[Array, "*B K"], r_hat: int) -> Float[Array, "*B R"]:
        """Sums the inputs of each group."""
        if self.groups[0] == 1:
            return _contiguous_sums(x, r_hat)
        surplus = -x.shape[-1] % r_hat
        tail = x[..., :surplus] if self.pad == "wrap" else jnp.zeros((*x.shape[:-1], surplus), x.dtype)
        x = jnp.concatenate([x, tail], axis=-1) if surplus else x
        return x.reshape(*x.shape[:-1], -1, r_hat).sum(axis=-2)

    def decompress(self, y: Float[Array, "*B R"], d: int) -> Float[Array, "*B D"]:
        """Copies each group's value to all outputs of the group."""
        return _spread(y, d, self.groups[1], axis=y.ndim - 1)

    def matrix(self, m_RR: Float[Array, "R R"], k: int, d: int) -> Float[Array, "K D"]:
        """dW[j, i] = M[g_in(j), g_out(i)]: the paper's, transposed as kernels are (inputs, outputs)."""
        m_RD = _spread(m_RR, d, self.groups[1], axis=1)
        dw_KD = _spread(m_RD, k, self.groups[0], axis=0)
        surplus = -k % m_RR.shape[0]
        if self.pad == "wrap" and self.groups[0] == 0 and surplus:
            dw_KD = dw_KD.at[:surplus].add(m_RD[m_RR.shape[0] - surplus :])
        return dw_KD


OPERATORS: tuple[type[Operator], ...] = (Share,)


def _contiguous_sums(x: Array, r_hat: int) -> Array:
    """Sums of r_hat runs of neighbours on the last axis; the first `width mod r_hat` runs are one longer."""
    length, longer = divmod(x.shape[-1], r_hat)
    cut = longer * (length + 1)
    head = x[..., :cut].reshape(*x.shape[:-1], longer, length + 1).sum(axis=-1)
    tail = x[..., cut:].reshape(*x.shape[:-1], r_hat - longer, length).sum(axis=-1)
    return jnp.concatenate([head, tail], axis=-1)


def _spread(y: Array, width: int, group: Group, axis: int) -> Array:
    """Copies entry g(j) of `axis` to place j for all j < width: broadcasts and reshapes, no gather."""
    r_hat = y.shape[axis]
    if group == 0:
        return lax.slice_in_dim(_copies(y, -(-width // r_hat), axis, axis), 0, width, axis=axis)
    length, longer = divmod(width, r_hat)
    head = _copies(lax.slice_in_dim(y, 0, longer, axis=axis), length + 1, axis + 1, axis)
    tail = _copies(lax.slice_in_dim(y, longer, r_hat, axis=axis), length, axis + 1, axis)
    return jnp.concatenate([head, tail], axis=axis)


def _copies(y: Array, n: int, new_axis: int, axis: int) -> Array:
    """Repeats y n times along a new axis, which is then folded into `axis`."""
    folded = (*y.shape[:axis], n * y.shape[axis], *y.shape[axis + 1 :])
    y = jnp.expand_dims(y, new_axis)
    return jnp.broadcast_to(y, (*y.shape[:new_axis], n, *y.shape[new_axis + 1 :])).reshape(folded)
