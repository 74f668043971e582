"""DoRA: a kernel as magnitude times direction, the direction updated by LoRA (arXiv:2402.09353)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from mora_jax.methods.base import Arrays, Leaf, Method, check_alpha, check_rank
from mora_jax.methods.lora import LoRA, low_rank_product

# Keeps a column of zeros a column of zeros.
TINY = 1e-30


@dataclasses.dataclass(frozen=True)
class DoRA(Method):
    """y = x @ (magnitude v / |v|) with v = w + scale a @ b and |v| the length of each column (Eq. 5).

    The length is a constant for the gradient (section 4.3). Not additive: the effective kernel is formed and
    differentiated as it stands, so it is not restarted either.

    Arrays: a_KR (k, rank), b_RD (rank, d) and magnitude_D (d,), float32.

    Attributes:
      rank: the width of the bottleneck.
      alpha: scale = alpha / rank.
    """

    rank: int = 128
    alpha: float = 128.0
    name: ClassVar[str] = "dora"
    additive: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_rank("DoRA's rank", self.rank)
        check_alpha(self.alpha)

    def init(self, key: PRNGKeyArray, w: Float[Array, "K D"]) -> dict[str, Array]:
        """LoRA's factors, and the lengths of the columns of w as magnitudes."""
        return self._direction().init(key, w) | {"magnitude_D": _lengths(w.astype(jnp.float32))}

    def leaves(self) -> dict[str, Leaf]:
        """Factors and magnitudes."""
        return self._direction().leaves() | {"magnitude_D": Leaf()}

    def count(self, k: int, d: int) -> int:
        """rank (k + d) + d."""
        return self._direction().count(k, d) + d

    def rank_bound(self, k: int, d: int) -> int:
        """Rescaling every column changes w by up to its full rank."""
        return min(k, d)

    def weight(self, arrays: Arrays, w: Float[Array, "K D"]) -> Float[Array, "K D"]:
        """In float32, whatever w's type: magnitudes and lengths must cancel at the start."""
        v_KD = w.astype(jnp.float32) + low_rank_product(arrays, self._direction().scale)
        ratio_D = arrays["magnitude_D"] / jax.lax.stop_gradient(_lengths(v_KD))
        return (v_KD * ratio_D[None, :]).astype(w.dtype)

    def _direction(self) -> LoRA:
        return LoRA(self.rank, self.alpha)


def _lengths(v_KD: Array) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(v_KD), axis=0) + TINY)
