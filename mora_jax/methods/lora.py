"""LoRA, a product of two low-rank matrices (arXiv:2106.09685), and its relatives that are options of it.

Legend of shapes in names: K inputs, D outputs, R the rank.
"""

import dataclasses
import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from mora_jax.errors import InputError
from mora_jax.methods.base import Arrays, Leaf, Method, check_alpha, check_dropout, check_rank


@dataclasses.dataclass(frozen=True)
class LoRA(Method):
    """y = x @ w + scale (x @ a) @ b, with a random and b zero at the start.

    Arrays: a_KR (k, rank) and b_RD (rank, d), float32.

    Attributes:
      rank: the width r of the bottleneck.
      alpha: scale = alpha / rank.
      rslora: scale = alpha / sqrt(rank) instead (rsLoRA, arXiv:2312.03732).
      b_lr_scale: the learning rate of b is so many times that of a (LoRA+, arXiv:2402.12354).
      train_factors: which factors are trained; with "b" a stays as it was drawn (AsyLoRA, arXiv:2402.16842).
      a_init: how a is drawn: "uniform" in +-1/sqrt(k), LoRA's Kaiming-uniform; "orthogonal" columns of
        length 1; "normal" with variance 1/k.
      dropout: share of the adapter's inputs that are zeroed in training.
    """

    rank: int = 128
    alpha: float = 128.0
    rslora: bool = False
    b_lr_scale: float = 1.0
    train_factors: Literal["ab", "b"] = "ab"
    a_init: Literal["uniform", "orthogonal", "normal"] = "uniform"
    dropout: float = 0.0
    name: ClassVar[str] = "lora"

    def __post_init__(self) -> None:
        check_rank("LoRA's rank", self.rank)
        if not 0 < self.b_lr_scale < math.inf:
            raise InputError(f"LoRA's b_lr_scale is above 0, not {self.b_lr_scale}")
        if self.train_factors not in ("ab", "b"):
            raise InputError(f"LoRA trains 'ab' or 'b', not {self.train_factors!r}")
        if self.a_init not in ("uniform", "orthogonal", "normal"):
            raise InputError(f"LoRA's a_init is 'uniform', 'orthogonal' or 'normal', not {self.a_init!r}")
        check_dropout(self.dropout)
        check_alpha(self.alpha)

    @property
    def scale(self) -> float:
        """The factor before the product."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def init(self, key: PRNGKeyArray, w: Float[Array, "K D"]) -> dict[str, Array]:
        """a_KR (k, rank) as `a_init` says, b_RD (rank, d) zero."""
        k, d = w.shape
        bound = 1 / math.sqrt(k)
        draw = {
            "uniform": lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound),
            "orthogonal": jax.nn.initializers.orthogonal(),
            "normal": jax.nn.initializers.normal(bound),
        }[self.a_init]
        return {"a_KR": draw(key, (k, self.rank)), "b_RD": jnp.zeros((self.rank, d), jnp.float32)}

    def leaves(self) -> dict[str, Leaf]:
        """Both factors, or b alone; b at its own rate."""
        return {"a_KR": Leaf(self.train_factors == "ab"), "b_RD": Leaf(lr_scale=self.b_lr_scale)}

    def count(self, k: int, d: int) -> int:
        """rank (k + d), or rank d where a is frozen."""
        return self.rank * (k + d if self.train_factors == "ab" else d)

    def rank_bound(self, k: int, d: int) -> int:
        """rank, at most min(k, d)."""
        return min(self.rank, k, d)

    def weight(self, arrays: Arrays, w: Float[Array, "K D"]) -> Float[Array, "K D"]:
        """w + scale a @ b, (k, d) in w's type."""
        return w + low_rank_product(arrays, self.scale).astype(w.dtype)

    def delta(self, arrays: Arrays, x: Float[Array, "*B K"], d: int) -> Float[Array, "*B D"]:
        """scale (x @ a) @ b: (..., k) -> (..., d)."""
        z = x @ arrays["a_KR"].astype(x.dtype)
        return (z * self.scale) @ arrays["b_RD"].astype(x.dtype)


def low_rank_product(arrays: Arrays, scale: float) -> Float[Array, "K D"]:
    """scale a @ b in float32, whatever the default precision of products is."""
    return scale * jnp.matmul(arrays["a_KR"], arrays["b_RD"], precision=jax.lax.Precision.HIGHEST)
