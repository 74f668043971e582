"""A square matrix between orthonormal bases, which a restart takes from the gradient.

Legend of shapes in names: K inputs, D outputs, R the side of M.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import ClassVar, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PRNGKeyArray

from mora_jax import sharding
from mora_jax.errors import InputError
from mora_jax.methods.base import (
    Arrays,
    Leaf,
    Method,
    RestartEffect,
    check_dropout,
    check_rank,
    in_parts,
    outers_by_parts,
)
from mora_jax.methods.lora import A_LAYOUT, B_LAYOUT, low_rank_product
from mora_jax.methods.mora import matching_side
from mora_jax.methods.peft import A, B, PeftAdapter
from mora_jax.sharding import STATE, Layout

_M_LAYOUT = Layout((P("fsdp", "tensor"), P(STATE, None)), hint="method.multiple 8 makes it divisible")
_EXACT = jax.lax.Precision.HIGHEST
Bases: TypeAlias = Literal["leading", "sampled"]


@dataclasses.dataclass(frozen=True)
class Spectral(Method):
    """y = x @ w + scale (x @ u) @ m @ v with m square and trained; the orthonormal u and v are not trained.

    This is MoRA (arXiv:2405.12130) whose operators are fitted to the kernel. `oriented` makes u and v
    singular vectors of the kernel's gradient, as GaLore (arXiv:2403.03507) projects gradients, so
    that m holds much of what a step would change. MoRA's groups know nothing of the kernel. Without a
    gradient u and v are random, with vectors of length 1 on average. The scale makes the entries of the
    update about as large as those of m.

    m has as many parameters as LoRA of the same rank. u and v are r_hat (k + d) numbers more to hold.

    Arrays: m_RR (r_hat, r_hat), u_KR (k, r_hat), v_RD (r_hat, d), float32.

    Attributes:
      rank: LoRA rank whose number of trainable parameters is matched.
      multiple: r_hat is rounded down to a multiple of this; 8 lets a mesh divide m among 8 devices.
      bases: which singular vectors: the leading ones; or ones drawn in proportion to their singular values
        (SARA, arXiv:2502.05790), so that more directions are trained over the restarts.
      dropout: share of the adapter's inputs that training sets to zero.
    """

    rank: int = 128
    multiple: int = 1
    bases: Bases = "leading"
    dropout: float = 0.0
    name: ClassVar[str] = "spectral"
    orients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_rank("Spectral's rank", self.rank)
        check_rank("Spectral's multiple", self.multiple)
        if self.bases not in get_args(Bases):
            raise InputError(f"Spectral's bases are {' or '.join(get_args(Bases))}, not {self.bases!r}")
        check_dropout(self.dropout)

    def r_hat(self, k: int, d: int) -> int:
        """Returns the side of m for a (k, d) kernel: sqrt((k + d) rank) rounded down, at most min(k, d)."""
        side = matching_side(self.rank, k, d)
        side -= side % self.multiple
        if not side:
            raise InputError(f"a kernel of {k}x{d} is too thin for multiple {self.multiple}")
        return side

    def scale(self, k: int, d: int) -> float:
        """Returns the factor of the update, sqrt(k d) / r_hat."""
        return math.sqrt(k * d) / self.r_hat(k, d)

    def init(self, key: PRNGKeyArray, w: Float[Array, "K D"]) -> dict[str, Array]:
        """Returns m_RR of zeros, and normal u_KR and v_RD whose vectors have length 1 on average."""
        (k, d), side = w.shape, self.r_hat(*w.shape)
        u_key, v_key = jax.random.split(key)
        return {
            "m_RR": jnp.zeros((side, side), jnp.float32),
            "u_KR": jax.random.normal(u_key, (k, side)) / math.sqrt(k),
            "v_RD": jax.random.normal(v_key, (side, d)) / math.sqrt(d),
        }

    def oriented(
        self, arrays: Arrays, gradient: Float[Array, "K D"], key: PRNGKeyArray | None = None
    ) -> dict[str, Array]:
        """Returns the arrays with singular vectors of the gradient as bases.

        Raises:
          InputError: if the bases are sampled and there is no key.
        """
        if not self.oriented_needs_key:
            key = None
        elif key is None:
            raise InputError("bases that are sampled need a random key")
        g_KD, side = gradient.astype(jnp.float32), arrays["m_RR"].shape[0]
        k, d = g_KD.shape
        if k > d:
            v_DR, u_KR = _bases(g_KD.T, side, key)
        else:
            u_KR, v_DR = _bases(g_KD, side, key)
        return {"m_RR": arrays["m_RR"], "u_KR": u_KR, "v_RD": v_DR.T}

    @property
    def oriented_needs_key(self) -> bool:
        """Whether the bases are sampled."""
        return self.bases == "sampled"

    def leaves(self) -> dict[str, Leaf]:
        """Returns m_RR as trained, and the bases as not."""
        return {
            "m_RR": Leaf(matrix=True, layout=_M_LAYOUT),
            "u_KR": Leaf(trainable=False, layout=A_LAYOUT),
            "v_RD": Leaf(trainable=False, layout=B_LAYOUT),
        }

    def weight(self, arrays: Arrays, w: Float[Array, "K D"]) -> Float[Array, "K D"]:
        """Returns w + scale u @ m @ v, (k, d) in w's type."""
        a_KR = jnp.matmul(arrays["u_KR"], arrays["m_RR"], precision=_EXACT)
        factors = {"a_KR": a_KR, "b_RD": arrays["v_RD"]}
        return w + low_rank_product(factors, self.scale(*w.shape)).astype(w.dtype)

    def delta(self, arrays: Arrays, x: Float[Array, "*B K"], d: int) -> Float[Array, "*B D"]:
        """Returns scale (x @ u) @ m @ v: (..., k) -> (..., d)."""
        u_KR, m_RR, v_RD = (arrays[name].astype(x.dtype) for name in ("u_KR", "m_RR", "v_RD"))
        return ((x @ u_KR) @ m_RR * self.scale(x.shape[-1], d)) @ v_RD

    def gradients(
        self,
        arrays: Sequence[Arrays],
        x: Float[Array, "*B K"],
        dy: Float[Array, "*B N D"],
        divided: tuple[int, int] = (0, 0),
    ) -> list[Arrays]:
        """Returns the gradients in parts, by one product x^T dy where that is cheaper than by `delta`."""
        k, d = divided[0] or x.shape[-1], divided[1] or dy.shape[-1]
        side = self.r_hat(k, d)
        if side * (k + d + side) < k * d:
            return super().gradients(arrays, x, dy, divided)
        x, dy = (a if cut else sharding.whole(a) for a, cut in zip((x, dy), divided, strict=True))
        g_GKND = outers_by_parts(x, dy, divided[1] > 0)
        axis = 1 if divided[0] else 2

        def of_arrays(g_GKD: Array, arrays: Arrays) -> Arrays:
            _, vjp = jax.vjp(lambda a: self.weight(a, jnp.zeros((k, d))), dict(arrays))
            return jax.vmap(vjp)(g_GKD)[0]

        # Devices sum what is as small as m, not the product.
        return [
            in_parts(functools.partial(of_arrays, arrays=a), g_GKND[:, :, i], axis, max(divided))
            for i, a in enumerate(arrays)
        ]

    @property
    def restart_effect(self) -> RestartEffect:
        """A restart draws the bases again, or takes them from a gradient."""
        return "redraw"

    def to_peft(self, arrays: Arrays, k: int, d: int) -> PeftAdapter:
        """Returns the update as LoRA of rank r_hat, without loss."""
        b_RD = self.scale(k, d) * jnp.matmul(arrays["m_RR"], arrays["v_RD"], precision=_EXACT)
        side = self.r_hat(k, d)
        return PeftAdapter({A: arrays["u_KR"].T, B: b_RD.T}, side, side)

    def count(self, k: int, d: int) -> int:
        """Returns r_hat^2."""
        return self.r_hat(k, d) ** 2

    def rank_bound(self, k: int, d: int) -> int:
        """Returns r_hat."""
        return self.r_hat(k, d)

    def describe(self, k: int, d: int) -> str:
        """Returns the rank that is matched, and r_hat."""
        return f"spectral r {self.rank}, r_hat {self.r_hat(k, d)}"


def _bases(
    g_KD: Float[Array, "K D"], side: int, key: PRNGKeyArray | None
) -> tuple[Float[Array, "K R"], Float[Array, "D R"]]:
    """Returns singular vectors of a matrix with K <= D, from its smaller Gram matrix, leading ones first.

    With a key they are drawn without replacement, in proportion to the singular values.
    """
    g_KD = g_KD / jnp.maximum(jnp.linalg.norm(g_KD), jnp.finfo(jnp.float32).tiny)
    squares_K, ascending_KK = jnp.linalg.eigh(jnp.matmul(g_KD, g_KD.T, precision=_EXACT))
    if key is None:
        chosen_R = jnp.arange(len(squares_K))[::-1][:side]
    else:
        # The largest sums of log weights and Gumbel noise are such a draw (arXiv:1903.06059).
        noise_K = jax.random.gumbel(key, squares_K.shape)
        scores_K = 0.5 * jnp.log(jnp.maximum(squares_K, jnp.finfo(jnp.float32).tiny)) + noise_K
        chosen_R = jnp.sort(jax.lax.top_k(scores_K, side)[1])[::-1]
    u_KR = ascending_KK[:, chosen_R]
    v_DR, _ = jnp.linalg.qr(jnp.matmul(g_KD.T, u_KR, precision=_EXACT))
    return u_KR, v_DR
