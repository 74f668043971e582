"""LoRA, a product of two low-rank matrices (arXiv:2106.09685), with its relatives as options.

Legend of shapes in names: K inputs, D outputs, R the rank.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PRNGKeyArray

from mora_jax.errors import InputError, check_float32
from mora_jax.methods.base import (
    Arrays,
    Leaf,
    Method,
    RestartEffect,
    check_alpha,
    check_dropout,
    check_rank,
)
from mora_jax.methods.peft import A, B, PeftAdapter
from mora_jax.sharding import STATE, Layout

A_LAYOUT = Layout((P(STATE, None), P("fsdp", "tensor"), P("tensor", "fsdp")))
B_LAYOUT = Layout((P(None, STATE), P("tensor", "fsdp"), P("fsdp", "tensor")))


@dataclasses.dataclass(frozen=True)
class LoRA(Method):
    """y = x @ w + scale (x @ a) @ b, with a random and b zero at the start.

    Arrays: a_KR (k, rank) and b_RD (rank, d), float32.

    Attributes:
      rank: width r of the bottleneck.
      alpha: the update is scaled by alpha / rank; the rank by default, which makes the scale 1.
      rslora: scale by alpha / sqrt(rank) instead (rsLoRA, arXiv:2312.03732).
      b_lr_scale: learning rate of b as a multiple of a's (LoRA+, arXiv:2402.12354).
      train_factors: factors that are trained; with "b", a stays as it was drawn (AsyLoRA, arXiv:2402.16842).
      a_init: how a is drawn: "uniform" in +-1/sqrt(k), LoRA's Kaiming-uniform; "orthogonal" columns of
        length 1; "normal" with variance 1/k.
      dropout: share of the adapter's inputs that training sets to zero.
    """

    rank: int = 128
    alpha: float | None = None
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
        check_float32("LoRA's b_lr_scale", self.b_lr_scale)
        if self.train_factors not in ("ab", "b"):
            raise InputError(f"LoRA's train_factors is 'ab' or 'b', not {self.train_factors!r}")
        if self.a_init not in ("uniform", "orthogonal", "normal"):
            raise InputError(f"LoRA's a_init is 'uniform', 'orthogonal' or 'normal', not {self.a_init!r}")
        check_dropout(self.dropout)
        check_alpha(self.alpha)

    @property
    def scale(self) -> float:
        """The factor before the product."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def restart_effect(self) -> RestartEffect:
        """A restart draws a again."""
        return "redraw"

    def init(self, key: PRNGKeyArray, w: Float[Array, "K D"]) -> dict[str, Array]:
        """Returns a_KR (k, rank), drawn as `a_init` says, and b_RD (rank, d) of zeros."""
        k, d = w.shape
        bound = 1 / math.sqrt(k)
        draw = {
            "uniform": lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound),
            "orthogonal": jax.nn.initializers.orthogonal(),
            "normal": jax.nn.initializers.normal(bound),
        }[self.a_init]
        return {"a_KR": draw(key, (k, self.rank)), "b_RD": jnp.zeros((self.rank, d), jnp.float32)}

    def leaves(self) -> dict[str, Leaf]:
        """Returns both factors, or only b as trained; b has its own learning rate."""
        return {
            "a_KR": Leaf(self.train_factors == "ab", matrix=True, layout=A_LAYOUT),
            "b_RD": Leaf(lr_scale=self.b_lr_scale, matrix=True, layout=B_LAYOUT),
        }

    def count(self, k: int, d: int) -> int:
        """Returns rank (k + d), or rank d if a is frozen."""
        return self.rank * (k + d if self.train_factors == "ab" else d)

    def rank_bound(self, k: int, d: int) -> int:
        """Returns the rank, at most min(k, d)."""
        return min(self.rank, k, d)

    def weight(self, arrays: Arrays, w: Float[Array, "K D"]) -> Float[Array, "K D"]:
        """Returns w + scale a @ b, (k, d) in w's type."""
        return w + low_rank_product(arrays, self.scale).astype(w.dtype)

    def delta(self, arrays: Arrays, x: Float[Array, "*B K"], d: int) -> Float[Array, "*B D"]:
        """Returns scale (x @ a) @ b: (..., k) -> (..., d)."""
        z = x @ arrays["a_KR"].astype(x.dtype)
        return (z * self.scale) @ arrays["b_RD"].astype(x.dtype)

    def to_peft(self, arrays: Arrays, k: int, d: int) -> PeftAdapter:
        """Returns both factors."""
        alpha = self.rank if self.alpha is None else self.alpha
        return PeftAdapter({A: arrays["a_KR"].T, B: arrays["b_RD"].T}, self.rank, alpha, self.rslora)

    @classmethod
    def from_peft(cls, found: PeftAdapter) -> Mapping[str, Any] | None:
        """Returns rank, alpha and rslora of a file of plain LoRA."""
        if found.dora or found.mora_type:
            return None
        return {"rank": found.rank, "alpha": float(found.alpha), "rslora": found.rslora}

    def peft_arrays(self, tensors: Arrays, k: int, d: int) -> dict[str, Array]:
        """Returns both factors."""
        return {"a_KR": tensors[A].T, "b_RD": tensors[B].T}


def low_rank_product(arrays: Arrays, scale: float) -> Float[Array, "K D"]:
    """Returns scale a @ b in float32, whatever the default precision of products is."""
    return scale * jnp.matmul(arrays["a_KR"], arrays["b_RD"], precision=jax.lax.Precision.HIGHEST)
