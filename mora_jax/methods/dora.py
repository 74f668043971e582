"""DoRA: a kernel as magnitude times direction, where LoRA updates the direction (arXiv:2402.09353)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from mora_jax.methods.base import Arrays, Leaf, Method, check_alpha, check_rank
from mora_jax.methods.lora import LoRA, low_rank_product
from mora_jax.methods.peft import MAGNITUDE, PeftAdapter

_TINY = 1e-30  # keeps the length of a column of zeros above zero


@dataclasses.dataclass(frozen=True)
class DoRA(Method):
    """y = x @ (magnitude v / |v|) with v = w + scale a @ b and |v| the length of each column (Eq. 5).

    The length is a constant for the gradient (section 4.3). The method is not additive: the effective kernel
    is formed and differentiated, and it cannot be restarted.

    Arrays: a_KR (k, rank), b_RD (rank, d) and magnitude_D (d,), float32.

    Attributes:
      rank: width of the bottleneck.
      alpha: the update is scaled by alpha / rank; the rank by default, which makes the scale 1.
    """

    rank: int = 128
    alpha: float | None = None
    name: ClassVar[str] = "dora"
    additive: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_rank("DoRA's rank", self.rank)
        check_alpha(self.alpha)

    def init(self, key: PRNGKeyArray, w: Float[Array, "K D"]) -> dict[str, Array]:
        """Returns LoRA's factors, and the lengths of w's columns as magnitudes."""
        return self._direction().init(key, w) | {"magnitude_D": _lengths(w.astype(jnp.float32))}

    def leaves(self) -> dict[str, Leaf]:
        """Returns LoRA's leaves and the magnitudes, which are not decayed."""
        return self._direction().leaves() | {"magnitude_D": Leaf(weight_decay=False)}

    def count(self, k: int, d: int) -> int:
        """Returns rank (k + d) + d."""
        return self._direction().count(k, d) + d

    def rank_bound(self, k: int, d: int) -> int:
        """Returns min(k, d): rescaling every column changes w by up to its full rank."""
        return min(k, d)

    def weight(self, arrays: Arrays, w: Float[Array, "K D"]) -> Float[Array, "K D"]:
        """Returns the effective kernel, computed in float32: magnitudes and lengths cancel at the start."""
        v_KD = w.astype(jnp.float32) + low_rank_product(arrays, self._direction().scale)
        ratio_D = arrays["magnitude_D"] / jax.lax.stop_gradient(_lengths(v_KD))
        return (v_KD * ratio_D[None, :]).astype(w.dtype)

    def to_peft(self, arrays: Arrays, k: int, d: int) -> PeftAdapter:
        """Returns LoRA's factors and the magnitudes."""
        found = self._direction().to_peft(arrays, k, d)
        tensors = {**found.tensors, MAGNITUDE: arrays["magnitude_D"]}
        return dataclasses.replace(found, tensors=tensors, dora=True)

    @classmethod
    def from_peft(cls, found: PeftAdapter) -> Mapping[str, Any] | None:
        """Returns rank and alpha of a file of DoRA."""
        if not found.dora or found.mora_type:
            return None
        return {"rank": found.rank, "alpha": float(found.scale * found.rank)}

    def peft_arrays(self, tensors: Arrays, k: int, d: int) -> dict[str, Array]:
        """Returns LoRA's factors and the magnitudes."""
        return self._direction().peft_arrays(tensors, k, d) | {"magnitude_D": tensors[MAGNITUDE]}

    def _direction(self) -> LoRA:
        return LoRA(self.rank, self.alpha)


def _lengths(v_KD: Array) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(v_KD), axis=0) + _TINY)
