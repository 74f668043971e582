"""MoRA: one square matrix between parameter-free compression and decompression (arXiv:2405.12130)."""

import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from mora_jax.errors import InputError
from mora_jax.methods.base import Arrays, Leaf, Method, check_dropout
from mora_jax.methods.operators import Operator, Share


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

    def __post_init__(self) -> None:
        if self.rank < 1 or self.align < 1:
            raise InputError(f"MoRA's rank and align are at least 1, not {self.rank} and {self.align}")
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
        return w + self.operator.matrix(arrays["m_RR"][:r_hat, :r_hat].astype(w.dtype), *w.shape)

    def delta(self, arrays: Arrays, x: Float[Array, "*B K"], d: int) -> Float[Array, "*B D"]:
        """f_decomp(f_comp(x) @ m), Eq. 3: (..., k) -> (..., d)."""
        m_RR = arrays["m_RR"]
        r_hat = self._used(arrays, x.shape[-1], d)
        z = self.operator.compress(x, r_hat, d)
        z = jnp.pad(z, [(0, 0)] * (z.ndim - 1) + [(0, m_RR.shape[0] - r_hat)])
        y = (z @ m_RR.astype(x.dtype))[..., :r_hat]
        return self.operator.decompress(y, d)

    def after_restart(self) -> "MoRA":
        """Sharing switches its group type, so that the next update spans other directions; others cannot."""
        return dataclasses.replace(self, operator=self.operator.switched())

    def _used(self, arrays: Arrays, k: int, d: int) -> int:
        return arrays["m_RR"].shape[0] if self.align == 1 else self.r_hat(k, d)
