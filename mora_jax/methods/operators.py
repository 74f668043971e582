"""MoRA's operators: they compress a width to r_hat, and decompress r_hat to a width.

All operators are linear, hold no parameters and act on the last axis. Beside the two directions, each gives
`matrix`, the dense update that M stands for: `decompress(compress(x) @ m) == x @ matrix(m)`, in O(k d) work.

Legend of shapes in names: K inputs (k in the paper), D outputs (d), R the side of M (r_hat), N blocks of
inputs, M blocks of outputs, P inputs with padding, J pairs of a block.
"""

import dataclasses
from typing import ClassVar, Literal, Self, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from mora_jax.errors import InputError
from mora_jax.methods.order import Order, drawn

Group: TypeAlias = Literal[0, 1]
Pad: TypeAlias = Literal["zero", "wrap"]
Surplus: TypeAlias = Literal["fold", "drop"]


class Operator:
    """One way to compress and decompress; subclasses are frozen dataclasses.

    Attributes:
      name: the operator's name in configs and on the command line.
      multiple: r_hat is a multiple of this.
      low_rank: whether M is applied to one vector of r_hat, so that an update is a product of that rank.
    """

    name: ClassVar[str]
    multiple: ClassVar[int] = 1
    low_rank: ClassVar[bool] = False

    def compress(self, x: Float[Array, "*B K"], r_hat: int, d: int) -> Float[Array, "*BN R"]:
        """Returns f_comp(x), which M is applied to: one vector of r_hat, or several blocks of it."""
        raise NotImplementedError

    def decompress(self, y: Float[Array, "*BN R"], d: int) -> Float[Array, "*B D"]:
        """Returns f_decomp(y): what M gives, back at the width d."""
        raise NotImplementedError

    def sums(self, r_hat: int, width: int) -> "tuple[GroupSums, GroupSums] | None":
        """Returns `compress` and the transpose of `decompress`, both padded with zeros to a width.

        Returns None for operators that apply M to several blocks.
        """
        return None

    def blocks(self, r_hat: int, k: int, d: int) -> int:
        """Returns the number of blocks of r_hat inputs that M multiplies; 0 for operators without blocks."""
        return 0

    def matrix(self, m_RR: Float[Array, "R R"], k: int, d: int) -> Float[Array, "K D"]:
        """Returns the update that M stands for, laid out as a kernel: (inputs, outputs)."""
        raise NotImplementedError

    def rank_bound(self, r_hat: int, k: int, d: int) -> int:
        """Returns the rank of `matrix` for almost every M: the largest that an update can have."""
        return min(r_hat, k, d)

    def switched(self, restarts: int = 1) -> Self:
        """Returns the operator after some restarts: itself if it has one pattern only."""
        return self

    def authors_type(self, r_hat: int, k: int, d: int) -> int:
        """Returns the number of what the authors' code computes alike for a (k, d) kernel; 0 if nothing."""
        return 0

    @property
    def pattern(self) -> str:
        """What `switched` changes, as text; empty if it changes nothing."""
        return ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ordered(Operator):
    """An operator whose inputs and outputs may be in another order after each restart.

    Attributes:
      reorder: each restart draws an order of the inputs and one of the outputs, which are then grouped or cut
        into blocks: all updates together reach every direction, where one order confines them to some.
      seed: seed of the orders.
      draw: number of the order, which each restart raises by one; 0 for the places as they are.
    """

    reorder: bool = False
    seed: int = 0
    draw: int = 0

    def __post_init__(self) -> None:
        for field in ("seed", "draw"):
            value = getattr(self, field)
            if not 0 <= value < 2**32:
                raise InputError(f"{self.name}'s {field} lies in [0, 2**32), not {value}")
        if self.draw and not self.reorder:
            raise InputError(f"{self.name}'s draw {self.draw} needs reorder")

    def switched(self, restarts: int = 1) -> Self:
        """Returns the operator with the next order."""
        return dataclasses.replace(self, draw=self.draw + restarts) if self.reorder else self

    @property
    def orders(self) -> tuple[Order, Order]:
        """Orders of (inputs, outputs)."""
        return drawn(self.seed, self.draw) if self.draw else (Order(), Order())

    @property
    def pattern(self) -> str:
        """The number of the order, such as "draw 3"; empty without one."""
        return f"draw {self.draw}" if self.draw else ""


@dataclasses.dataclass(frozen=True)
class GroupSums:
    """Sums over r_hat groups of the last axis, (..., K) -> (..., width), padded with zeros.

    Attributes:
      r_hat: number of groups.
      group: type of the groups, as in `Share`.
      pad: as in `Share`.
      width: width of the result, at least r_hat.
      order: order of the places that are grouped.
    """

    r_hat: int
    group: Group
    pad: Pad
    width: int
    order: Order = Order()  # noqa: RUF009 (frozen)

    def __call__(self, x: Float[Array, "*B K"]) -> Float[Array, "*B S"]:
        x = self.order(x, x.ndim - 1)
        if self.group == 1:
            sums = _contiguous_sums(x, self.r_hat)
        else:
            sums = _blocks(x, self.r_hat, self.pad).sum(axis=-2)
        return resized(sums, self.width, axis=x.ndim - 1)


@dataclasses.dataclass(frozen=True)
class Truncate(Operator):
    """Truncation (Eq. 4): the first r_hat inputs update the first r_hat outputs; the rest is unchanged."""

    name: ClassVar[str] = "truncate"
    low_rank: ClassVar[bool] = True

    def compress(self, x: Float[Array, "*B K"], r_hat: int, d: int) -> Float[Array, "*B R"]:
        """Returns the first r_hat inputs."""
        return resized(x, r_hat, axis=x.ndim - 1)

    def decompress(self, y: Float[Array, "*B R"], d: int) -> Float[Array, "*B D"]:
        """Returns the r_hat outputs, padded with zeros."""
        return resized(y, d, axis=y.ndim - 1)

    def matrix(self, m_RR: Float[Array, "R R"], k: int, d: int) -> Float[Array, "K D"]:
        """Returns zeros with M in the upper left corner."""
        return resized(resized(m_RR, k, axis=0), d, axis=1)


@dataclasses.dataclass(frozen=True)
class Share(Ordered):
    """Sharing (Eq. 6 and 7): dW[i, j] = M[g_out(i), g_in(j)]; inputs and outputs of a group share a row of M.

    Attributes:
      group: group type 0 is strided, g(j) = j mod r_hat; type 1 is contiguous, r_hat runs of neighbours whose
        lengths differ by at most one. A pair gives the types of input and output.
      pad: if r_hat does not divide the number of inputs, "zero" keeps each input in one group (Eq. 7);
        "wrap" appends the first inputs again, as the authors' code does. Only for strided inputs.
      cycle: group types that restarts cycle through: 2 is the paper's, 0 -> 1 -> 0; 4 is that of the authors'
        code, all pairs: (0, 0) -> (1, 1) -> (1, 0) -> (0, 1) -> (0, 0).
    """

    group: Group | tuple[Group, Group] = 0
    pad: Pad = "zero"
    cycle: Literal[2, 4] = 2
    name: ClassVar[str] = "share"
    low_rank: ClassVar[bool] = True

    def __post_init__(self) -> None:
        group = tuple(self.group) if isinstance(self.group, list | tuple) else self.group
        object.__setattr__(self, "group", group)
        if (group not in (0, 1) or isinstance(group, bool)) and not (
            isinstance(group, tuple) and len(group) == 2 and all(g in (0, 1) for g in group)
        ):
            raise InputError(f"share's group type is 0, 1 or a pair of them (input, output), not {group!r}")
        _check_choice("share", "pad", self.pad, ("zero", "wrap"))
        _check_choice("share", "cycle", self.cycle, (2, 4))
        super().__post_init__()

    @property
    def groups(self) -> tuple[Group, Group]:
        """Group types of (input, output)."""
        return self.group if isinstance(self.group, tuple) else (self.group, self.group)

    def switched(self, restarts: int = 1) -> Self:
        """Returns the operator with the next group type of its cycle, and the next order."""
        pair = self.groups
        for _ in range(restarts % self.cycle):
            pair = _FOLLOWING[self.cycle][pair]
        group = pair[0] if pair[0] == pair[1] else pair
        return dataclasses.replace(super().switched(restarts), group=group)

    @property
    def pattern(self) -> str:
        """The group type, such as "0" or "(0, 1)", and the number of the order, such as "0 draw 3"."""
        return f"{self.group} {super().pattern}".rstrip()

    def authors_type(self, r_hat: int, k: int, d: int) -> int:
        """Returns the number of the groups, 1 to 4, unless they are others or padded in another way."""
        if self.draw:
            return 0
        same = self.pad == "wrap" or self.groups[0] == 1 or k % r_hat == 0
        return _TYPES_OF_PAIRS[self.groups] if same else 0

    def compress(self, x: Float[Array, "*B K"], r_hat: int, d: int) -> Float[Array, "*B R"]:
        """Returns the sum of the inputs of each group."""
        return GroupSums(r_hat, self.groups[0], self.pad, r_hat, self.orders[0])(x)

    def decompress(self, y: Float[Array, "*B R"], d: int) -> Float[Array, "*B D"]:
        """Returns each group's value, copied to all outputs of the group."""
        return self.orders[1].back(_spread(y, d, self.groups[1], axis=y.ndim - 1), y.ndim - 1)

    def sums(self, r_hat: int, width: int) -> "tuple[GroupSums, GroupSums]":
        """Returns sums over the groups of inputs, and over those of outputs."""
        (g_in, g_out), (o_in, o_out) = self.groups, self.orders
        inputs = GroupSums(r_hat, g_in, self.pad, width, o_in)
        return inputs, GroupSums(r_hat, g_out, "zero", width, o_out)

    def matrix(self, m_RR: Float[Array, "R R"], k: int, d: int) -> Float[Array, "K D"]:
        """Returns dW[j, i] = M[g_in(j), g_out(i)]: the paper's, transposed to (inputs, outputs)."""
        o_in, o_out = self.orders
        m_RD = o_out.back(_spread(m_RR, d, self.groups[1], axis=1), 1)
        if self.pad == "zero" or self.groups[0] == 1:
            return o_in.back(_spread(m_RD, k, self.groups[0], axis=0), 0)
        return o_in.back(_wrapped_rows(_spread(m_RD, k + -k % m_RR.shape[0], 0, axis=0), k), 0)


@dataclasses.dataclass(frozen=True)
class Decouple(Ordered):
    """Decoupling (Eq. 8): the inputs are cut into blocks of r_hat, and M maps each to a block of the outputs.

    If there are more output blocks than input blocks, the outputs are tiled.

    Attributes:
      pad: if r_hat does not divide the number of inputs, the last block is padded with "zero", or by "wrap"
        with the first inputs again, as the authors' code does.
      surplus: if there are more input blocks than output blocks, "fold" adds the surplus ones to the output
        blocks, so that every input counts; "drop" ignores them, as the authors' code does.
    """

    pad: Pad = "zero"
    surplus: Surplus = "fold"
    name: ClassVar[str] = "decouple"

    def __post_init__(self) -> None:
        _check_choice(self.name, "pad", self.pad, ("zero", "wrap"))
        _check_choice(self.name, "surplus", self.surplus, ("fold", "drop"))
        super().__post_init__()

    def compress(self, x: Float[Array, "*B K"], r_hat: int, d: int) -> Float[Array, "*B N R"]:
        """Returns the rotated blocks, at most as many as output blocks; surplus ones are added or dropped."""
        x_BNR = self._rotated(_blocks(self.orders[0](x, x.ndim - 1), r_hat, self.pad))
        wanted = -(-d // r_hat)
        if self.surplus == "drop" or x_BNR.shape[-2] <= wanted:
            return x_BNR[..., :wanted, :]
        x_BNR = resized(x_BNR, -(-x_BNR.shape[-2] // wanted) * wanted, axis=x_BNR.ndim - 2)
        return x_BNR.reshape(*x_BNR.shape[:-2], -1, wanted, r_hat).sum(axis=-3)

    def decompress(self, y: Float[Array, "*B N R"], d: int) -> Float[Array, "*B D"]:
        """Returns the blocks joined, and repeated up to the width d."""
        y = y.reshape(*y.shape[:-2], -1)
        return self.orders[1].back(_spread(y, d, 0, axis=y.ndim - 1), y.ndim - 1)

    def matrix(self, m_RR: Float[Array, "R R"], k: int, d: int) -> Float[Array, "K D"]:
        """Returns the rotated M in block (i, o) if input block i maps to output block o, else zeros."""
        r_hat = m_RR.shape[0]
        n_in, n_out = -(-k // r_hat), -(-d // r_hat)
        i_N1, o_1M = np.arange(n_in)[:, None], np.arange(n_out)[None, :]
        fold = self.surplus == "fold" and n_in > n_out
        counts_NM = (i_N1 % n_out == o_1M) if fold else (o_1M % n_in == i_N1)
        m_NRR = self._rotated_back(jnp.broadcast_to(m_RR, (n_in, r_hat, r_hat)))
        dw_NRMR = m_NRR[:, :, None, :] * jnp.asarray(counts_NM, m_RR.dtype)[:, None, :, None]
        dw_PD = dw_NRMR.reshape(n_in * r_hat, n_out * r_hat)[:, :d]
        dw_KD = _wrapped_rows(dw_PD, k) if self.pad == "wrap" else dw_PD[:k]
        o_in, o_out = self.orders
        return o_out.back(o_in.back(dw_KD, 0), 1)

    def blocks(self, r_hat: int, k: int, d: int) -> int:
        """Returns the number of input blocks or of output blocks, whichever is smaller."""
        return min(-(-k // r_hat), -(-d // r_hat))

    def rank_bound(self, r_hat: int, k: int, d: int) -> int:
        """Returns the rank of blocks of rank r_hat side by side."""
        return min(self.blocks(r_hat, k, d) * r_hat, k, d)

    def _rotated(self, x_BNR: Array) -> Array:
        """Returns the blocks as M takes them: unchanged here."""
        return x_BNR

    def _rotated_back(self, m_NRR: Array) -> Array:
        """Returns the matrices whose product with a block equals M's with the rotated block."""
        return m_NRR


@dataclasses.dataclass(frozen=True)
class Rotate(Decouple):
    """Rotation (Eq. 9-11): decoupling, with block i (from 0) first rotated by i theta_j.

    The pairs are (j, j + r_hat / 2), theta_j = 10000^(-2 j / r_hat) with j from 0, as in rotary embeddings.
    """

    name: ClassVar[str] = "rotate"
    multiple: ClassVar[int] = 2

    def authors_type(self, r_hat: int, k: int, d: int) -> int:
        """Returns 6, unless the order is another, or padding or surplus blocks are treated differently."""
        padded_alike = not self.draw and (self.pad == "wrap" or k % r_hat == 0)
        return 6 if padded_alike and (self.surplus == "drop" or -(-k // r_hat) <= -(-d // r_hat)) else 0

    def _rotated(self, x_BNR: Array) -> Array:
        cos_NJ, sin_NJ = (a.reshape((1,) * (x_BNR.ndim - 2) + a.shape) for a in _angles(*x_BNR.shape[-2:]))
        x1, x2 = jnp.split(x_BNR.astype(jnp.float32), 2, axis=-1)
        rotated = [x1 * cos_NJ - x2 * sin_NJ, x2 * cos_NJ + x1 * sin_NJ]
        return jnp.concatenate(rotated, axis=-1).astype(x_BNR.dtype)

    def _rotated_back(self, m_NRR: Array) -> Array:
        cos_NJ1, sin_NJ1 = (a[..., None] for a in _angles(*m_NRR.shape[:2]))
        m1, m2 = jnp.split(m_NRR, 2, axis=1)
        return jnp.concatenate([m1 * cos_NJ1 + m2 * sin_NJ1, m2 * cos_NJ1 - m1 * sin_NJ1], axis=1)


# A new operator is one class and one entry here, read whenever a name is looked up.
OPERATORS: dict[str, type[Operator]] = {o.name: o for o in (Truncate, Share, Decouple, Rotate)}

# The pair of group types that follows another, by the length of the cycle.
_FOLLOWING: dict[int, dict[tuple[Group, Group], tuple[Group, Group]]] = {
    2: {(0, 0): (1, 1), (1, 1): (0, 0), (1, 0): (0, 1), (0, 1): (1, 0)},
    4: {(0, 0): (1, 1), (1, 1): (1, 0), (1, 0): (0, 1), (0, 1): (0, 0)},
}

_TYPES_OF_PAIRS: dict[tuple[Group, Group], int] = {(0, 0): 1, (1, 1): 2, (1, 0): 3, (0, 1): 4}


def _check_choice(operator: str, field: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise InputError(f"{operator}'s {field} is {' or '.join(map(repr, choices))}, not {value!r}")


def _angles(blocks: int, r_hat: int) -> tuple[Array, Array]:
    """Returns cos and sin of i theta_j, each (N, R/2), float32: constants of the compiled program."""
    theta_J = 10_000.0 ** (-np.arange(0, r_hat, 2) / r_hat)
    angles_NJ = np.arange(blocks)[:, None] * theta_J[None, :]
    return jnp.asarray(np.cos(angles_NJ), jnp.float32), jnp.asarray(np.sin(angles_NJ), jnp.float32)


def resized(x: Array, width: int, axis: int) -> Array:
    """Returns x cut, or padded with zeros, to `width` entries on `axis`."""
    kept = lax.slice_in_dim(x, 0, min(width, x.shape[axis]), axis=axis)
    missing = [(0, width - kept.shape[axis]) if a == axis else (0, 0) for a in range(x.ndim)]
    return jnp.pad(kept, missing)


def _blocks(x: Array, r_hat: int, pad: Pad) -> Array:
    """Returns the last axis cut into blocks of r_hat, (..., N, R), the last one padded."""
    surplus = -x.shape[-1] % r_hat
    width, axis = x.shape[-1] + surplus, x.ndim - 1
    x = _spread(x, width, 0, axis) if pad == "wrap" else resized(x, width, axis)
    return x.reshape(*x.shape[:-1], -1, r_hat)


def _wrapped_rows(dw_PD: Array, k: int) -> Array:
    """Returns k rows, the rows beyond them added to those whose inputs they repeat."""
    rounds = -(-dw_PD.shape[0] // k)
    return resized(dw_PD, rounds * k, axis=0).reshape(rounds, k, -1).sum(axis=0)


def _contiguous_sums(x: Array, r_hat: int) -> Array:
    """Returns sums of r_hat runs on the last axis; the first `width mod r_hat` runs are one longer."""
    length, longer = divmod(x.shape[-1], r_hat)
    cut = longer * (length + 1)
    head = x[..., :cut].reshape(*x.shape[:-1], longer, length + 1).sum(axis=-1)
    tail = x[..., cut:].reshape(*x.shape[:-1], r_hat - longer, length).sum(axis=-1)
    return jnp.concatenate([head, tail], axis=-1)


def _spread(y: Array, width: int, group: Group, axis: int) -> Array:
    """Returns y with entry g(j) of `axis` copied to place j for all j < width, without a gather."""
    r_hat = y.shape[axis]
    if group == 0:
        return lax.slice_in_dim(_copies(y, -(-width // r_hat), axis, axis), 0, width, axis=axis)
    length, longer = divmod(width, r_hat)
    head = _copies(lax.slice_in_dim(y, 0, longer, axis=axis), length + 1, axis + 1, axis)
    tail = _copies(lax.slice_in_dim(y, longer, r_hat, axis=axis), length, axis + 1, axis)
    return jnp.concatenate([head, tail], axis=axis)


def _copies(y: Array, n: int, new_axis: int, axis: int) -> Array:
    """Returns y repeated n times along a new axis, which is then folded into `axis`."""
    folded = (*y.shape[:axis], n * y.shape[axis], *y.shape[axis + 1 :])
    y = jnp.expand_dims(y, new_axis)
    return jnp.broadcast_to(y, (*y.shape[:new_axis], n, *y.shape[new_axis + 1 :])).reshape(folded)
