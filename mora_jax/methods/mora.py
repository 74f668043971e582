"""MoRA: one square matrix between parameter-free compression and decompression (arXiv:2405.12130)."""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from mora_jax import sharding
from mora_jax.errors import InputError
from mora_jax.methods.base import Arrays, Leaf, Method, check_dropout, check_rank, outer_by_parts, padded
from mora_jax.methods.operators import GroupSums, Operator, Share, resized

# The floating-point operations that take as long as moving one byte. Products run at about 650 TFLOP/s,
# sums over groups at about 3 TB/s (H100), and the launch of a kernel costs as well. With 210 to 275 what was
# fastest is taken for every layer of the 250M and 1.3B models (docs/performance.md).
FLOPS_PER_BYTE = 250

# Products take rows of a multiple of this many numbers, whatever the side of the stored M: 16 bytes of
# bfloat16 are read at once.
ROW = 8


@dataclasses.dataclass(frozen=True)
class MoRA(Method):
    """y = x @ w + f_decomp(f_comp(x) @ m) with m square (Eq. 3), as many parameters as LoRA of the same rank.

    Arrays: m_RR (side, side), float32, with side = r_hat or the next multiple of `align`.

    Attributes:
      rank: the LoRA rank whose count of trainable parameters is matched.
      operator: the compression and decompression.
      align: m is stored padded with zeros to a multiple of this. The padding has exactly zero gradient, so it
        stays zero; 128 keeps products fast and shardable. With 1, r_hat is the side of the stored m.
      dropout: share of the adapter's inputs that are zeroed in training.
    """

    rank: int = 128
    operator: Operator = Share()  # noqa: RUF009 (frozen and hashable, so safe to share)
    align: int = 1
    dropout: float = 0.0
    name: ClassVar[str] = "mora"
    merged_min_tokens: ClassVar[int] = 1024  # no product is needed to make its update of a kernel

    def __post_init__(self) -> None:
        check_rank("MoRA's rank", self.rank)
        check_rank("MoRA's align", self.align)
        check_dropout(self.dropout)

    def r_hat(self, k: int, d: int) -> int:
        """The side of M for a (k, d) kernel: floor(sqrt((k + d) rank)), at most min(k, d)."""
        side = min(math.isqrt((k + d) * self.rank), k, d)
        side -= side % self.operator.multiple
        if not side:
            raise InputError(f"a kernel of {k}x{d} is too thin for operator {self.operator.name}")
        return side

    def init(self, key: PRNGKeyArray, w: Float[Array, "K D"]) -> dict[str, Array]:
        """m is zero, so no key is needed."""
        side = -(-self.r_hat(*w.shape) // self.align) * self.align
        return {"m_RR": jnp.zeros((side, side), jnp.float32)}

    def leaves(self) -> dict[str, Leaf]:
        """m is trained."""
        return {"m_RR": Leaf()}

    def count(self, k: int, d: int) -> int:
        """r_hat^2, never more than LoRA's rank (k + d)."""
        return self.r_hat(k, d) ** 2

    def rank_bound(self, k: int, d: int) -> int:
        """What the operator makes of a full-rank m."""
        return self.operator.rank_bound(self.r_hat(k, d), k, d)

    def weight(self, arrays: Arrays, w: Float[Array, "K D"]) -> Float[Array, "K D"]:
        """w + the operator's matrix of m, (k, d) in w's type."""
        r_hat = self._used(arrays, *w.shape)
        m_RR = sharding.undivided(arrays["m_RR"])[:r_hat, :r_hat]
        return w + sharding.undivided(self.operator.matrix(m_RR.astype(w.dtype), *w.shape))

    def delta(self, arrays: Arrays, x: Float[Array, "*B K"], d: int) -> Float[Array, "*B D"]:
        """f_decomp(f_comp(x) @ m), Eq. 3: (..., k) -> (..., d)."""
        r_hat, side = self._used(arrays, x.shape[-1], d), _rows(arrays)
        # Groups and blocks do not end where a mesh divides a width.
        z = sharding.whole(self.operator.compress(sharding.whole(x), r_hat, d))
        m_SS = _square(arrays["m_RR"].astype(x.dtype), side)
        y = sharding.whole(padded(z, -1, side) @ m_SS)[..., :r_hat]
        return sharding.whole(self.operator.decompress(y, d))

    def gradients(
        self, arrays: Sequence[Arrays], x: Float[Array, "*B K"], dy: Float[Array, "*B N D"]
    ) -> list[Arrays]:
        """f_comp(x)^T f_decomp^T(dy), with the sums over groups before or after the product.

        They commute with it. Before it they make it smaller but read all activations once more; after it
        they cost O(k d). The cheapest of the four orders is taken. Where M is applied to several blocks,
        activations are cut into blocks, or the whole product is.
        """
        k, (n, d) = x.shape[-1], dy.shape[-2:]
        r_hat, side = self._used(arrays[0], k, d), _rows(arrays[0])
        x, dy = sharding.whole(x), sharding.whole(dy)
        if sums := self.operator.sums(r_hat, side):
            gs = self._of_sums(sums, x, dy)
        elif _cut_first(k, d, n, side, self.operator.blocks(r_hat, k, d)):
            gs = self._of_blocks(r_hat, side, x, dy)
        else:
            gs = self._of_product(r_hat, x, dy)
        return [{"m_RR": _square(g, a["m_RR"].shape[0])} for g, a in zip(gs, arrays, strict=True)]

    def _of_sums(
        self, sums: tuple[GroupSums, GroupSums], x: Float[Array, "*B K"], dy: Float[Array, "*B N D"]
    ) -> list[Array]:
        """The gradients of N kernels, x and dy being summed over their groups before or after the product."""
        k, (n, d) = x.shape[-1], dy.shape[-2:]
        sum_x, sum_dy = sums
        first_x, first_dy = _summed_first(k, d, n, sum_x.width)
        x = sum_x(x) if first_x else x
        dy = sum_dy(dy) if first_dy else dy
        g_GKD = outer_by_parts(x, dy.reshape(*dy.shape[:-2], -1))
        g_GKND = g_GKD.reshape(*g_GKD.shape[:2], n, -1)
        g_GKND = g_GKND if first_dy else sum_dy(g_GKND)
        gs = [g_GKND[:, :, i] for i in range(n)]
        gs = gs if first_x else [sum_x(g.swapaxes(1, 2)).swapaxes(1, 2) for g in gs]
        return [g.sum(axis=0) for g in gs]

    def _of_blocks(
        self, r_hat: int, side: int, x: Float[Array, "*B K"], dy: Float[Array, "*B N D"]
    ) -> list[Array]:
        """The gradients of N kernels from the blocks of inputs and outputs between which M stands."""
        d = dy.shape[-1]
        z = sharding.whole(self.operator.compress(x, r_hat, d))
        outputs = jax.linear_transpose(lambda y: self.operator.decompress(y, d), z)
        z = padded(z, -1, side)
        dys = [padded(sharding.whole(outputs(dy[..., i, :])[0]), -1, side) for i in range(dy.shape[-2])]
        return [outer_by_parts(z, dy).sum(axis=0) for dy in dys]

    def _of_product(self, r_hat: int, x: Float[Array, "*B K"], dy: Float[Array, "*B N D"]) -> list[Array]:
        """The gradients of N kernels from one product x^T dy, of which the operator takes what is M's."""
        k, (n, d) = x.shape[-1], dy.shape[-2:]
        m_RR = jax.ShapeDtypeStruct((r_hat, r_hat), jnp.float32)
        folded = jax.vmap(jax.linear_transpose(lambda m_RR: self.operator.matrix(m_RR, k, d), m_RR))
        g_GKND = outer_by_parts(x, dy.reshape(*dy.shape[:-2], -1)).reshape(-1, k, n, d)
        return [folded(g_GKND[:, :, i])[0].sum(axis=0) for i in range(n)]

    def after_restart(self) -> "MoRA":
        """Sharing switches its group type, so that the next update spans other directions; others cannot."""
        return dataclasses.replace(self, operator=self.operator.switched())

    def _used(self, arrays: Arrays, k: int, d: int) -> int:
        return arrays["m_RR"].shape[0] if self.align == 1 else self.r_hat(k, d)


def _rows(arrays: Arrays) -> int:
    """The width of what M is multiplied with, and of M's padded rows."""
    side = arrays["m_RR"].shape[0]
    return side + -side % ROW


def _square(m: Array, side: int) -> Array:
    """M, or its gradient, cut or filled up with zeros to a side."""
    return resized(resized(m, side, axis=0), side, axis=1)


def _summed_first(k: int, d: int, kernels: int, side: int) -> tuple[bool, bool]:
    """Whether x, and the dy of every kernel, are best summed over their groups before the product x^T dy."""

    def cost(first_x: bool, first_dy: bool) -> int:
        inputs, outputs = side if first_x else k, side if first_dy else d
        numbers = first_x * (k + side) + first_dy * kernels * (d + side)  # moved for each token, 2 bytes each
        return 2 * inputs * kernels * outputs + FLOPS_PER_BYTE * 2 * numbers

    orders = [(False, False), (True, False), (False, True), (True, True)]
    return min(orders, key=lambda order: cost(*order))


def _cut_first(k: int, d: int, kernels: int, side: int, blocks: int) -> bool:
    """Whether x, and the dy of every kernel, are best cut into the blocks that M is applied to, instead of
    the whole product x^T dy."""
    if not blocks:
        return True
    # Cutting reads and writes them once; each kernel's own product reads them again.
    numbers = k * (2 + kernels) + 3 * kernels * d
    return 2 * blocks * kernels * side**2 + FLOPS_PER_BYTE * 2 * numbers <= 2 * k * kernels * d
