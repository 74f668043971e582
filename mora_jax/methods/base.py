"""What a method is."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from mora_jax import sharding
from mora_jax.errors import InputError

Arrays: TypeAlias = Mapping[str, Array]
_LARGEST_RANK = 2**16


@dataclasses.dataclass(frozen=True)
class Leaf:
    """How one array of an adapter is trained: at all, and at what multiple of the learning rate."""

    trainable: bool = True
    lr_scale: float = 1.0


class Method:
    """One way to update a kernel: frozen, hashable hyper-parameters and pure functions of arrays.

    Subclasses are frozen dataclasses. Everything here speaks of one kernel `(k, d)`, laid out (inputs,
    outputs); stacked kernels are handled by `jax.vmap` outside.
    """

    name: ClassVar[str]
    additive: ClassVar[bool] = True  # whether `delta` exists
    # Making the effective kernel costs O(k d) a step whatever the batch, `delta` O(tokens (k + d)): from this
    # many tokens on the former is the faster (docs/performance.md).
    merged_min_tokens: ClassVar[int] = 2048
    dropout: float = 0.0  # share of the adapter's inputs zeroed in training; a field where a method has it

    def init(self, key: PRNGKeyArray, w: Float[Array, "K D"]) -> dict[str, Array]:
        """The adapter's arrays (float32) for a kernel like w, such that `weight(arrays, w) == w`."""
        raise NotImplementedError

    def leaves(self) -> dict[str, Leaf]:
        """How each array that `init` makes is trained."""
        raise NotImplementedError

    def count(self, k: int, d: int) -> int:
        """The trainable parameters of a (k, d) kernel's adapter, without any padding of stored arrays."""
        raise NotImplementedError

    def rank_bound(self, k: int, d: int) -> int:
        """The rank that the update of a (k, d) kernel can have, which it has for almost all arrays."""
        raise NotImplementedError

    def weight(self, arrays: Arrays, w: Float[Array, "K D"]) -> Float[Array, "K D"]:
        """The effective kernel: the definition of the method."""
        raise NotImplementedError

    def delta(self, arrays: Arrays, x: Float[Array, "*B K"], d: int) -> Float[Array, "*B D"]:
        """For additive methods `x @ (weight(arrays, w) - w)` without w: linear in x, computed in x's type."""
        raise NotImplementedError(f"{self.name} is not additive: it has no update that is linear in x alone")

    def gradients(
        self, arrays: Sequence[Arrays], x: Float[Array, "*B K"], dy: Float[Array, "*B N D"]
    ) -> list[Arrays]:
        """For additive methods the gradients of the arrays of N kernels of one shape and one input.

        Args:
          arrays: those of each kernel's adapter.
          x: the input.
          dy: the gradients of the kernels' outputs.
        """
        return self.compressed_gradients(arrays, x, dy)

    def compressed_gradients(
        self, arrays: Sequence[Arrays], x: Float[Array, "*B K"], dy: Float[Array, "*B N D"]
    ) -> list[Arrays]:
        """`gradients` by the vjp of `delta`."""

        def one(i: int) -> Arrays:
            _, vjp = jax.vjp(lambda a: self.delta(a, x, dy.shape[-1]), arrays[i])
            return vjp(dy[..., i, :])[0]

        return [one(i) for i in range(len(arrays))]

    def after_restart(self) -> "Method":
        """The method that follows once this one's update has been merged."""
        return self


@functools.partial(jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["method"])
@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter's arrays with the method that gives them meaning; made only where the model is applied."""

    arrays: Arrays
    method: Method


def padded(x: Array, axis: int, multiple: int) -> Array:
    """x with zeros behind it on an axis, up to a multiple."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths)


def outer(x: Float[Array, "*B K"], dy: Float[Array, "*B D"]) -> Float[Array, "K D"]:
    """x^T dy over all of the batch, in float32."""
    return jnp.einsum("...k,...d->kd", x, dy, preferred_element_type=jnp.float32)


def outer_by_parts(x: Float[Array, "B *T K"], dy: Float[Array, "B *T D"]) -> Float[Array, "G K D"]:
    """x^T dy over each part of the batch that a mesh makes of it, so that nothing is sent yet."""
    parts = math.gcd(sharding.batch_shards(), x.shape[0])
    if parts == 1:
        return outer(x, dy)[None]
    x_GTK, dy_GTD = (sharding.whole(a.reshape(parts, -1, a.shape[-1])) for a in (x, dy))
    return sharding.whole(jnp.einsum("gtk,gtd->gkd", x_GTK, dy_GTD, preferred_element_type=jnp.float32))


def check_dropout(rate: float) -> None:
    """Raises InputError unless the rate lies in [0, 1)."""
    if not 0 <= rate < 1:
        raise InputError(f"dropout lies in [0, 1), not {rate}")


def check_rank(what: str, rank: int) -> None:
    """Raises InputError unless a rank, or a multiple to align to, is one that a kernel may have."""
    if rank < 1:
        raise InputError(f"{what} is at least 1, not {rank}")
    if rank > _LARGEST_RANK:
        raise InputError(f"{what} is at most {_LARGEST_RANK:,}, not {rank}")


def check_alpha(alpha: float) -> None:
    """Raises InputError unless alpha is finite."""
    if not math.isfinite(alpha):
        raise InputError(f"alpha is finite, not {alpha}")
