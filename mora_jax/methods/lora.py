"""LoRA: a product of two low-rank matrices (arXiv:2106.09685)."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from mora_jax.errors import InputError
from mora_jax.methods.base import Arrays, Leaf, Method


@dataclasses.dataclass(frozen=True)
class LoRA(Method):
    """y = x @ w + (alpha / rank) (x @ a) @ b, with a Kaiming-uniform and b zero at the start.

    Attributes:
      rank: the width r of the bottleneck.
      alpha: the scale of the update is alpha / rank.
    """

    rank: int = 128
    alpha: float = 128.0
    name: ClassVar[str] = "lora"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"LoRA's rank is at least 1, not {self.rank}")

    @property
    def scale(self) -> float:
        """The factor before the product."""
        return self.alpha / self.rank

    def init(self, key: PRNGKeyArray, w: Float[Array, "K D"]) -> dict[str, Array]:
        """a is uniform in +-1/sqrt(k) (Kaiming-uniform with slope sqrt 5, as in the reference), b zero."""
        k, d = w.shape
        bound = 1 / math.sqrt(k)
        a_KR = jax.random.uniform(key, (k, self.rank), jnp.float32, -bound, bound)
        return {"a_KR": a_KR, "b_RD": jnp.zeros((self.rank, d), jnp.float32)}

    def leaves(self) -> dict[str, Leaf]:
        return {"a_KR": Leaf(), "b_RD": Leaf()}

    def count(self, k: int, d: int) -> int:
        return self.rank * (k + d)

    def weight(self, arrays: Arrays, w: Float[Array, "K D"]) -> Float[Array, "K D"]:
        ab = jnp.matmul(arrays["a_KR"], arrays["b_RD"], precision=jax.lax.Precision.HIGHEST)
        return w + (self.scale * ab).astype(w.dtype)

    def delta(self, arrays: Arrays, x: Float[Array, "*B K"], d: int) -> Float[Array, "*B D"]:
        z = x @ arrays["a_KR"].astype(x.dtype)
        return (z * self.scale) @ arrays["b_RD"].astype(x.dtype)
