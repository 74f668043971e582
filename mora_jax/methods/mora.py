"""MoRA: one square matrix between parameter-free compression and decompression (arXiv:2405.12130).

Legend of shapes in names: K inputs (k), D outputs (d), R the side of M (r_hat), S the side of M as products
use it, N kernels of one input, G parts that devices compute.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

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
    outer_by_parts,
    outers_by_parts,
    padded,
)
from mora_jax.methods.cost import flops_per_byte
from mora_jax.methods.operators import OPERATORS, GroupSums, Operator, Ordered, Rotate, Share, resized
from mora_jax.methods.peft import A, B, PeftAdapter
from mora_jax.sharding import STATE, Layout

# Rows of M and of what it multiplies are padded to a multiple of this: 16 bytes of bfloat16 are read at once.
ROW = 8

# The operators of the authors' code, by their numbers there.
_SHARES = (Share(0, "wrap", 4), Share(1, "wrap", 4), Share((1, 0), "wrap", 4), Share((0, 1), "wrap", 4))
_AUTHORS = {o.authors_type(1, 1, 1): o for o in (*_SHARES, Rotate("wrap", "drop"))}

_M_LAYOUT = Layout((P("fsdp", "tensor"), P(STATE, None)), hint="method.align 128 makes it divisible")


@dataclasses.dataclass(frozen=True)
class MoRA(Method):
    """y = x @ w + f_decomp(f_comp(x) @ m) with m square (Eq. 3), as many parameters as LoRA of the same rank.

    Arrays: m_RR (side, side), float32, with side = r_hat or the next multiple of `align`.

    Attributes:
      rank: LoRA rank whose number of trainable parameters is matched.
      operator: how inputs are compressed to r_hat and outputs decompressed from it.
      align: m is stored padded with zeros to a multiple of this. The padding has exactly zero gradient, so it
        stays zero; 128 keeps products fast and m divisible over a mesh.
      dropout: share of the adapter's inputs that training sets to zero.
      r_hat_from: "rank" rounds r_hat down, to at most min(k, d); "rounded" rounds it to the nearest, without
        a limit, as the authors' code does.
    """

    rank: int = 128
    operator: Operator = Share()  # noqa: RUF009 (frozen and hashable, so safe to share)
    align: int = 1
    dropout: float = 0.0
    r_hat_from: Literal["rank", "rounded"] = "rank"
    name: ClassVar[str] = "mora"
    merged_min_tokens: ClassVar[int] = 1024  # no product is needed to make its update of a kernel
    gradients_by_parts: ClassVar[bool] = True
    gathers_activations: ClassVar[bool] = True  # `delta`: groups do not end where a kernel is divided

    def __post_init__(self) -> None:
        check_rank("MoRA's rank", self.rank)
        check_rank("MoRA's align", self.align)
        check_dropout(self.dropout)
        if not isinstance(self.operator, Operator):
            names = ", ".join(f"{cls.__name__}()" for cls in OPERATORS.values())
            raise InputError(f"MoRA's operator is one of {names}, not {self.operator!r}")
        if self.r_hat_from not in ("rank", "rounded"):
            raise InputError(f"MoRA's r_hat_from is 'rank' or 'rounded', not {self.r_hat_from!r}")

    def r_hat(self, k: int, d: int) -> int:
        """Returns the side of M for a (k, d) kernel: sqrt((k + d) rank), rounded as `r_hat_from` says."""
        rounding = _rounded if self.r_hat_from == "rounded" else matching_side
        side = rounding(self.rank, k, d)
        side -= side % self.operator.multiple
        if not side:
            raise InputError(f"a kernel of {k}x{d} is too thin for operator {self.operator.name}")
        return side

    def init(self, key: PRNGKeyArray, w: Float[Array, "K D"]) -> dict[str, Array]:
        """Returns m_RR of zeros; no key is needed."""
        side = self._side(*w.shape)
        return {"m_RR": jnp.zeros((side, side), jnp.float32)}

    def leaves(self) -> dict[str, Leaf]:
        """Returns m_RR as trained."""
        return {"m_RR": Leaf(matrix=True, layout=_M_LAYOUT)}

    def weight(self, arrays: Arrays, w: Float[Array, "K D"]) -> Float[Array, "K D"]:
        """Returns w + the operator's matrix of m, (k, d) in w's type."""
        m_RR = self._used({"m_RR": sharding.undivided(arrays["m_RR"])}, *w.shape)
        return w + sharding.undivided(self.operator.matrix(m_RR.astype(w.dtype), *w.shape))

    def delta(self, arrays: Arrays, x: Float[Array, "*B K"], d: int) -> Float[Array, "*B D"]:
        """Returns f_decomp(f_comp(x) @ m), Eq. 3: (..., k) -> (..., d)."""
        r_hat, side = self.r_hat(x.shape[-1], d), _rows(arrays)
        # Groups and blocks do not end where a mesh divides a width.
        z = sharding.whole(self.operator.compress(sharding.whole(x), r_hat, d))
        m_SS = _square(arrays["m_RR"].astype(x.dtype), side)
        y = sharding.whole(padded(z, -1, side) @ m_SS)[..., :r_hat]
        return sharding.whole(self.operator.decompress(y, d))

    def gradients(
        self,
        arrays: Sequence[Arrays],
        x: Float[Array, "*B K"],
        dy: Float[Array, "*B N D"],
        divided: tuple[int, int] = (0, 0),
    ) -> list[Arrays]:
        """Returns f_comp(x)^T f_decomp^T(dy) in parts, with sums over groups before or after the product.

        The sums commute with the product. Before it they make it smaller but read all activations once more;
        after it they cost O(k d). The cheapest of the four orders is taken. An operator that applies M to
        several blocks cuts either the activations into blocks, or the full product.

        Where `tensor` divides a width, each device sums its own part of it over groups, or cuts it from the
        product. So devices send each other parts of M's gradient, instead of activations.
        """
        if x.ndim == 1:
            x, dy = x[None], dy[None]
        k, d = divided[0] or x.shape[-1], divided[1] or dy.shape[-1]
        r_hat, side = self.r_hat(k, d), _rows(arrays[0])
        x, dy = (a if cut else sharding.whole(a) for a, cut in zip((x, dy), divided, strict=True))
        if sums := self.operator.sums(r_hat, side):
            gs = _gradients_of_sums(sums, x, dy, divided)
        elif not any(divided) and _cut_first(k, d, dy.shape[-2], side, self.operator.blocks(r_hat, k, d)):
            gs = self._gradients_of_blocks(r_hat, side, x, dy)
        else:
            gs = self._gradients_of_product(r_hat, x, dy, divided)
        return [{"m_RR": _square(g, a["m_RR"].shape[0])} for g, a in zip(gs, arrays, strict=True)]

    def _gradients_of_blocks(
        self, r_hat: int, side: int, x: Float[Array, "*B K"], dy: Float[Array, "*B N D"]
    ) -> list[Array]:
        """Returns N gradients in parts, from the blocks of inputs and outputs that M connects."""
        d = dy.shape[-1]
        z = sharding.whole(self.operator.compress(x, r_hat, d))
        outputs = jax.linear_transpose(lambda y: self.operator.decompress(y, d), z)
        z = padded(z, -1, side)
        dys = [padded(sharding.whole(outputs(dy[..., i, :])[0]), -1, side) for i in range(dy.shape[-2])]
        return [outer_by_parts(z, dy) for dy in dys]

    def _gradients_of_product(
        self, r_hat: int, x: Float[Array, "*B K"], dy: Float[Array, "*B N D"], divided: tuple[int, int]
    ) -> list[Array]:
        """Returns N gradients in parts, from x^T dy, by the transpose of the operator's `matrix`."""
        k, d = divided[0] or x.shape[-1], divided[1] or dy.shape[-1]
        m_RR = jax.ShapeDtypeStruct((r_hat, r_hat), jnp.float32)

        def folded(g_GKD: Array) -> Array:
            one = jax.linear_transpose(lambda m_RR: self.operator.matrix(m_RR, k, d), m_RR)
            return jax.vmap(one)(g_GKD)[0]

        g_GKND = outers_by_parts(x, dy, divided[1] > 0)
        axis = 1 if divided[0] else 2
        return [in_parts(folded, g_GKND[:, :, i], axis, max(divided)) for i in range(dy.shape[-2])]

    def after_restart(self, restarts: int = 1) -> "MoRA":
        """Returns MoRA with the operator's next pattern, so that the next update spans other directions."""
        return dataclasses.replace(self, operator=self.operator.switched(restarts))

    @property
    def restart_effect(self) -> RestartEffect:
        """Sharing switches its group type; other operators have one pattern unless restarts reorder."""
        return "same" if self.after_restart() == self else "switch"

    @property
    def pattern(self) -> str:
        """The group type of sharing, such as "0" or "(0, 1)", and the number of an order, as "draw 3"."""
        return self.operator.pattern

    def restart_warning(self) -> str:
        """Returns a warning if the operator has one pattern only."""
        if self.restart_effect == "switch":
            return ""
        alone = " without reorder" if isinstance(self.operator, Ordered) else ""
        name = f"operator {self.operator.name}"
        return f"{name} has one pattern{alone}: restarts add no rank to the sum of updates"

    def to_peft(self, arrays: Arrays, k: int, d: int) -> PeftAdapter | None:
        """Returns the update as LoRA of rank r_hat, without loss: compress and m as one factor, decompress.

        Decoupling and rotation apply m to several blocks, so their updates exceed that rank.
        """
        if not self.operator.low_rank:
            return None
        m_RR = self._used(arrays, k, d)
        r_hat = len(m_RR)
        a_KR = self.operator.matrix(m_RR, k, r_hat)
        b_RD = self.operator.matrix(jnp.eye(r_hat), r_hat, d)
        return PeftAdapter({A: a_KR.T, B: b_RD.T}, r_hat, r_hat)

    def to_authors(self, arrays: Arrays, k: int, d: int) -> PeftAdapter | None:
        """Returns m with the LoRA rank that the authors' rounding takes to r_hat, not always an integer."""
        m_RR = self._used(arrays, k, d)
        r_hat = len(m_RR)
        number = self.operator.authors_type(r_hat, k, d)
        if not number:
            return None
        theirs = dataclasses.replace(self, r_hat_from="rounded").r_hat(k, d)
        rank = self.rank if theirs == r_hat else r_hat**2 / (k + d)
        return PeftAdapter({A: m_RR.T, B: m_RR.T}, rank, rank, mora_type=number)

    @classmethod
    def from_peft(cls, found: PeftAdapter) -> Mapping[str, Any] | None:
        """Returns rank, rounding and operator of a file of MoRA's authors.

        A rank that is no integer is what `to_authors` writes for our rounding.
        """
        if found.mora_type not in _AUTHORS or found.dora:
            return None
        operator = _AUTHORS[found.mora_type]
        r_hat_from = "rounded" if found.rank == int(found.rank) else "rank"
        fields = {"rank": math.ceil(found.rank), "r_hat_from": r_hat_from, "operator": operator.name}
        return fields | dataclasses.asdict(operator)

    def peft_arrays(self, tensors: Arrays, k: int, d: int) -> dict[str, Array]:
        """Returns m, padded as `align` says. Raises InputError if a file's two copies of it differ."""
        if not jnp.array_equal(tensors[A], tensors[B]):
            raise InputError("lora_A and lora_B differ, and MoRA has one matrix")
        return {"m_RR": _square(tensors[A].T, *self.shapes(k, d)["m_RR"][:1])}

    def _side(self, k: int, d: int) -> int:
        """Returns the side of M as it is stored."""
        return -(-self.r_hat(k, d) // self.align) * self.align

    def _used(self, arrays: Arrays, k: int, d: int) -> Float[Array, "R R"]:
        """Returns m without its padding."""
        r_hat = self.r_hat(k, d)
        return arrays["m_RR"][:r_hat, :r_hat]

    def count(self, k: int, d: int) -> int:
        """Returns r_hat^2; with r_hat from the rank never more than LoRA's rank (k + d)."""
        return self.r_hat(k, d) ** 2

    def rank_bound(self, k: int, d: int) -> int:
        """Returns the rank that the operator makes of a full-rank m."""
        return self.operator.rank_bound(self.r_hat(k, d), k, d)

    def describe(self, k: int, d: int) -> str:
        """Returns the rank that is matched, and r_hat."""
        return f"mora r {self.rank}, r_hat {self.r_hat(k, d)}"

    def ranks(self, k: int, d: int) -> str:
        """Returns r_hat and the attainable rank."""
        return f"{self.r_hat(k, d)} / {self.rank_bound(k, d)}"

    @classmethod
    def variants(cls, rank: int) -> dict[str, Method]:
        """Returns MoRA with each operator."""
        return {f"mora {name}": cls(rank, operator()) for name, operator in OPERATORS.items()}

    def example(self, key: PRNGKeyArray, w: Float[Array, "K D"], std: float) -> dict[str, Array]:
        """Returns a random m_RR whose padding is zero."""
        m_RR = super().example(key, w, std)["m_RR"]
        inside = jnp.arange(m_RR.shape[0]) < self.r_hat(*w.shape)
        return {"m_RR": jnp.where(inside[:, None] & inside[None, :], m_RR, 0.0)}


def matching_side(rank: int, k: int, d: int) -> int:
    """Returns the side of a square as large as LoRA's factors of a rank, rounded down, at most min(k, d)."""
    return min(math.isqrt((k + d) * rank), k, d)


def _rounded(rank: int, k: int, d: int) -> int:
    """Returns r_hat as the authors' code rounds it."""
    return int(math.sqrt((k + d) * rank) + 0.5)


def _rows(arrays: Arrays) -> int:
    """Returns the width of what M is multiplied with, and of M's padded rows."""
    side = arrays["m_RR"].shape[0]
    return side + -side % ROW


def _square(m: Array, side: int) -> Array:
    """Returns M, or parts of its gradient, cut or padded with zeros to a side."""
    return resized(resized(m, side, axis=m.ndim - 2), side, axis=m.ndim - 1)


def _gradients_of_sums(
    sums: tuple[GroupSums, GroupSums],
    x: Float[Array, "*B K"],
    dy: Float[Array, "*B N D"],
    divided: tuple[int, int],
) -> list[Array]:
    """Returns N gradients in parts; x and dy are summed over their groups before or after the product."""
    (sum_x, sum_dy), (k, d), n = sums, divided, dy.shape[-2]
    shards = [sharding.tensor_shards() if width else 1 for width in divided]
    widths = x.shape[-1] // shards[0], dy.shape[-1] // shards[1]
    first_x, first_dy = _summed_first(*widths, n, sum_x.width)
    outer = functools.partial(outers_by_parts, divided=d > 0 and not first_dy)
    if first_x:
        x = sharding.by_width(sum_x, x, x.ndim - 1, k) if k else sharding.whole(sum_x(x))
        outer = jax.vmap(outer, (0, None)) if k else outer
    if first_dy:
        dy = sharding.by_width(sum_dy, dy, dy.ndim - 1, d) if d else sharding.whole(sum_dy(dy))
        outer = jax.vmap(outer, (None, 0)) if d else outer
    g = outer(x, dy)
    g_GKND = sharding.one_each(g.reshape(-1, *g.shape[-3:]))

    def sum_rows(g_GKD: Array) -> Array:
        return sum_x(g_GKD.swapaxes(1, 2)).swapaxes(1, 2)

    def after(function: Callable[[Array], Array], g: Array, axis: int, width: int) -> Array:
        if any(divided):
            return sharding.one_each(in_parts(function, g, axis, width))
        return sharding.whole(function(sharding.whole(g)))

    g_GKND = g_GKND if first_dy else after(sum_dy, g_GKND, 3, d)
    gs = [g_GKND[:, :, i] for i in range(n)]
    return gs if first_x else [after(sum_rows, g_GKD, 1, k) for g_GKD in gs]


def _summed_first(k: int, d: int, kernels: int, side: int) -> tuple[bool, bool]:
    """Returns whether summing x, and the dy of every kernel, before the product x^T dy is cheapest.

    Args:
      k: inputs that a device has.
      d: outputs that it has.
      kernels: the number of kernels.
      side: inputs, and outputs, that the sums leave.
    """

    def cost(order: tuple[bool, bool]) -> float:
        first_x, first_dy = order
        inputs, outputs = side if first_x else k, side if first_dy else d
        numbers = first_x * (k + side) + first_dy * kernels * (d + side)  # moved for each token, 2 bytes each
        return 2 * inputs * kernels * outputs + flops_per_byte() * 2 * numbers

    return min([(False, False), (True, False), (False, True), (True, True)], key=cost)


def _cut_first(k: int, d: int, kernels: int, side: int, blocks: int) -> bool:
    """Returns whether cutting x and dy into blocks is cheaper than cutting the full product x^T dy."""
    if not blocks:
        return True
    # Cutting reads and writes them once; each kernel's own product reads them again.
    numbers = k * (2 + kernels) + 3 * kernels * d
    return 2 * blocks * kernels * side**2 + flops_per_byte() * 2 * numbers <= 2 * k * kernels * d
