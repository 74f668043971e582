"""MoRA: one square matrix between parameter-free compression and decompression (arXiv:2405.12130)."""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from mora_jax import sharding
from mora_jax.errors import InputError
from mora_jax.methods.base import Arrays, Leaf, Method, check_dropout, check_rank, outer_by_parts, padded
from mora_jax.methods.operators import Operator, Share

# The floating-point operations that take as long as moving one byte. Products run at about 650 TFLOP/s,
# sums over groups at about 3 TB/s (H100), and the launch of a kernel costs as well. With 210 to 340 the
# fastest order is taken for every layer of the 250M and 1.3B models (docs/performance.md).
FLOPS_PER_BYTE = 250


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
        m_RR = arrays["m_RR"]
        r_hat = self._used(arrays, x.shape[-1], d)
        # Groups and blocks do not end where a mesh divides a width.
        z = sharding.whole(self.operator.compress(sharding.whole(x), r_hat, d))
        z = padded(z, -1, m_RR.shape[0])
        y = sharding.whole(z @ m_RR.astype(x.dtype))[..., :r_hat]
        return sharding.whole(self.operator.decompress(y, d))

    def gradients(
        self, arrays: Sequence[Arrays], x: Float[Array, "*B K"], dy: Float[Array, "*B N D"]
    ) -> list[Arrays]:
        """f_comp(x)^T f_decomp^T(dy), with the sums over groups before or after the product.

        They commute with it. Before it they make it smaller but read all activations once more; after it
        they cost O(k d). The cheapest of the four orders is taken.
        """
        k, (n, d), side = x.shape[-1], dy.shape[-2:], arrays[0]["m_RR"].shape[0]
        sums = self.operator.sums(self._used(arrays[0], k, d), side)
        if sums is None:
            return self.compressed_gradients(arrays, x, dy)
        sum_x, sum_dy = sums
        first_x, first_dy = _summed_first(k, d, n, side)
        x, dy = sharding.whole(x), sharding.whole(dy)
        x = sum_x(x) if first_x else x
        dy = sum_dy(dy) if first_dy else dy
        g_GKD = outer_by_parts(x, dy.reshape(*dy.shape[:-2], -1))
        g_GKND = g_GKD.reshape(*g_GKD.shape[:2], n, -1)
        g_GKND = g_GKND if first_dy else sum_dy(g_GKND)
        gs = [g_GKND[:, :, i] for i in range(n)]
        gs = gs if first_x else [sum_x(g.swapaxes(1, 2)).swapaxes(1, 2) for g in gs]
        return [{"m_RR": g.sum(axis=0)} for g in gs]

    def after_restart(self) -> "MoRA":
        """Sharing switches its group type, so that the next update spans other directions; others cannot."""
        return dataclasses.replace(self, operator=self.operator.switched())

    def _used(self, arrays: Arrays, k: int, d: int) -> int:
        return arrays["m_RR"].shape[0] if self.align == 1 else self.r_hat(k, d)


def _summed_first(k: int, d: int, kernels: int, side: int) -> tuple[bool, bool]:
    """Whether x, and the dy of every kernel, are best summed over their groups before the product x^T dy."""

    def cost(first_x: bool, first_dy: bool) -> int:
        inputs, outputs = side if first_x else k, side if first_dy else d
        numbers = first_x * (k + side) + first_dy * kernels * (d + side)  # moved for each token, 2 bytes each
        return 2 * inputs * kernels * outputs + FLOPS_PER_BYTE * 2 * numbers

    orders = [(False, False), (True, False), (False, True), (True, True)]
    return min(orders, key=lambda order: cost(*order))
