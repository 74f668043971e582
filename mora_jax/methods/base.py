"""What a method is: hyper-parameters, pure functions of arrays, and every fact about itself."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from mora_jax import sharding
from mora_jax.errors import InputError, check_float32
from mora_jax.methods.peft import PeftAdapter
from mora_jax.sharding import REPLICATED, Layout

Arrays: TypeAlias = Mapping[str, Array]
RestartEffect: TypeAlias = Literal["no", "same", "switch", "redraw"]
_LARGEST_RANK = 2**16


@dataclasses.dataclass(frozen=True)
class Leaf:
    """How one array of an adapter is trained and sharded.

    Attributes:
      trainable: whether the array is trained.
      lr_scale: multiple of the learning rate.
      weight_decay: whether weight decay applies.
      matrix: whether the array of one kernel is a matrix, which Muon may update.
      layout: how the array may be divided over a mesh.
    """

    trainable: bool = True
    lr_scale: float = 1.0
    weight_decay: bool = True
    matrix: bool = False
    layout: Layout = REPLICATED


class Method:
    """One way to update a kernel.

    Subclasses are frozen, hashable dataclasses. All functions are about one kernel (k, d), laid out (inputs,
    outputs). Stacked kernels are handled outside. A subclass states everything that the rest
    of the project needs to know about it; no other file names a method.

    Attributes:
      name: the method's name in configs and on the command line.
      additive: whether the update is linear in the input, so that `delta` exists.
      merged_min_tokens: from this many tokens on, adding the update to the kernel is faster than computing
        `delta`. The former costs O(k d) a step, the latter O(tokens (k + d)) (docs/performance.md).
      gradients_by_parts: whether `gradients` has a part for each shard of the batch, and over `tensor` for
        each part of a width, for any kernel.
      gathers_activations: whether other gradients than these need activations that `tensor` divides to be
        all-gathered.
      orients: whether `oriented` does something with the kernel's gradient.
      dropout: share of the adapter's inputs that training sets to zero. A field where a method has it.
    """

    name: ClassVar[str]
    additive: ClassVar[bool] = True
    merged_min_tokens: ClassVar[int] = 2048
    gradients_by_parts: ClassVar[bool] = False
    gathers_activations: ClassVar[bool] = False
    orients: ClassVar[bool] = False
    dropout: float = 0.0

    # What the method computes.

    def init(self, key: PRNGKeyArray, w: Float[Array, "K D"]) -> dict[str, Array]:
        """Returns the adapter's arrays (float32) for a kernel like w, such that `weight(arrays, w) == w`."""
        raise NotImplementedError

    def oriented(
        self, arrays: Arrays, gradient: Float[Array, "K D"], key: PRNGKeyArray | None = None
    ) -> dict[str, Array]:
        """Returns the arrays of an adapter without an update yet, fitted to the gradient of its kernel.

        `key` is for methods that draw something.
        """
        return dict(arrays)

    @property
    def oriented_needs_key(self) -> bool:
        """Whether `oriented` draws something from the gradient, and so needs a key."""
        return False

    def leaves(self) -> dict[str, Leaf]:
        """Returns how each array that `init` makes is trained and sharded."""
        raise NotImplementedError

    def shapes(self, k: int, d: int) -> Mapping[str, tuple[int, ...]]:
        """Returns the shapes that arrays of a (k, d) kernel must have; those of `init` by default."""
        return _shapes(self, k, d)

    def weight(self, arrays: Arrays, w: Float[Array, "K D"]) -> Float[Array, "K D"]:
        """Returns the effective kernel: the definition of the method."""
        raise NotImplementedError

    def delta(self, arrays: Arrays, x: Float[Array, "*B K"], d: int) -> Float[Array, "*B D"]:
        """Returns `x @ (weight(arrays, w) - w)` without w, in x's type. Only for additive methods."""
        raise NotImplementedError(f"{self.name} is not additive: it has no update that is linear in x alone")

    def gradients(
        self,
        arrays: Sequence[Arrays],
        x: Float[Array, "*B K"],
        dy: Float[Array, "*B N D"],
        divided: tuple[int, int] = (0, 0),
    ) -> list[Arrays]:
        """Returns the gradients of the arrays of N kernels with one shape and one input, in parts.

        Each is (G, ...), parts that devices computed, so that the caller sums them over devices. Only for
        additive methods. A method that knows a cheaper way than the vjp of `delta` overrides this.

        Args:
          arrays: the arrays of each kernel's adapter.
          x: the input.
          dy: the gradients of the kernels' outputs.
          divided: the number of the kernel's inputs, or of its outputs, if `tensor` divides them; both are 0
            if it divides neither. What is divided may be wider than the kernel, padded with zeros.
        """
        k, d = divided
        return self.compressed_gradients(arrays, x[..., :k] if k else x, dy[..., :d] if d else dy)

    def compressed_gradients(
        self, arrays: Sequence[Arrays], x: Float[Array, "*B K"], dy: Float[Array, "*B N D"]
    ) -> list[Arrays]:
        """Returns `gradients` in one part, by the vjp of `delta`."""

        def one(i: int) -> Arrays:
            _, vjp = jax.vjp(lambda a: self.delta(a, x, dy.shape[-1]), arrays[i])
            return {name: g[None] for name, g in vjp(dy[..., i, :])[0].items()}

        return [one(i) for i in range(len(arrays))]

    # What a restart does.

    def after_restart(self, restarts: int = 1) -> "Method":
        """Returns the method that follows after some restarts, each of which merges the update."""
        return self

    @property
    def restart_effect(self) -> RestartEffect:
        """What a restart does: not possible, same pattern, switched pattern, or random arrays redrawn."""
        return "same" if self.additive else "no"

    @property
    def pattern(self) -> str:
        """What a restart switches, such as MoRA's group type, for logs; empty if there is no such thing."""
        return ""

    def restart_warning(self) -> str:
        """Returns a sentence for the user if restarts are allowed but of little use; empty otherwise."""
        return ""

    # What adapter files hold.

    def to_peft(self, arrays: Arrays, k: int, d: int) -> PeftAdapter | None:
        """Returns the adapter of a (k, d) kernel as LoRA's files hold it, None if they cannot."""
        return None

    def to_authors(self, arrays: Arrays, k: int, d: int) -> PeftAdapter | None:
        """Returns the adapter of a (k, d) kernel as files of MoRA's authors hold it, None if they cannot."""
        return None

    @classmethod
    def from_peft(cls, found: PeftAdapter) -> Mapping[str, Any] | None:
        """Returns the fields that a file states of a method of this class, None if it is of another class.

        They are in the flat form of `registry`. The tensors are not looked at.
        """
        return None

    def peft_arrays(self, tensors: Arrays, k: int, d: int) -> dict[str, Array]:
        """Returns the arrays of a (k, d) kernel's adapter from tensors as `PeftAdapter` holds them."""
        raise NotImplementedError

    # What people read.

    def count(self, k: int, d: int) -> int:
        """Returns the trainable parameters of a (k, d) kernel's adapter, without padding of stored arrays."""
        raise NotImplementedError

    def rank_bound(self, k: int, d: int) -> int:
        """Returns the largest rank of a (k, d) kernel's update, which almost all arrays reach."""
        raise NotImplementedError

    def describe(self, k: int, d: int) -> str:
        """Returns a few words about the adapter of a (k, d) kernel, such as "lora r 8"."""
        rank = getattr(self, "rank", None)
        return self.name if rank is None else f"{self.name} r {rank}"

    def ranks(self, k: int, d: int) -> str:
        """Returns the attainable rank of a (k, d) kernel's update as a cell of `mora methods`."""
        return f"{self.rank_bound(k, d)}"

    @classmethod
    def variants(cls, rank: int) -> "dict[str, Method]":
        """Returns the rows of `mora methods` for this method, by name."""
        fields = {field.name for field in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
        return {cls.name: cls(rank=rank) if "rank" in fields else cls()}  # pyright: ignore[reportCallIssue]

    def example(self, key: PRNGKeyArray, w: Float[Array, "K D"], std: float) -> dict[str, Array]:
        """Returns `init`'s arrays plus normal noise, for checks: arrays of zeros would prove nothing.

        Padding of stored arrays stays zero.
        """
        return {name: a + std * jax.random.normal(key, a.shape) for name, a in self.init(key, w).items()}


@functools.partial(jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["method"])
@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter's arrays with the method that gives them meaning; made only where the model is applied."""

    arrays: Arrays
    method: Method


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["w", "arrays"], meta_fields=["method", "path"]
)
@dataclasses.dataclass(frozen=True)
class Bound:
    """A kernel with its adapter, in the kernel's place among the parameters; only `dense` can apply it.

    It is no array: code that takes it for one fails.

    Attributes:
      w: the kernel (..., in, out). The first leaf: Flax compares its shape with that of the initialisation.
      arrays: the adapter's arrays.
      method: what the arrays mean.
      path: the kernel's path, for messages.
    """

    w: Array
    arrays: Arrays
    method: Method
    path: str

    @property
    def adapter(self) -> Adapter:
        """The adapter by itself."""
        return Adapter(self.arrays, self.method)

    def __getitem__(self, layer: int | Array) -> "Bound":
        """Returns one kernel of a stack."""
        arrays = {name: array[layer] for name, array in self.arrays.items()}
        return dataclasses.replace(self, w=self.w[layer], arrays=arrays)

    def __jax_array__(self) -> Array:
        raise InputError(
            f"the model reads {self.path} itself, and would ignore its {self.method.name} adapter: bind is "
            f"for models that call mora_jax.dense, use mora_jax.adapted"
        )


@functools.lru_cache(maxsize=1024)
def _shapes(method: Method, k: int, d: int) -> Mapping[str, tuple[int, ...]]:
    made = jax.eval_shape(method.init, jax.random.key(0), jax.ShapeDtypeStruct((k, d), jnp.float32))
    return {name: array.shape for name, array in made.items()}


def padded(x: Array, axis: int, multiple: int) -> Array:
    """Returns x padded with zeros at the end of an axis, up to a multiple."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths)


def outer_by_parts(x: Float[Array, "B *T K"], dy: Float[Array, "B *T D"]) -> Float[Array, "G K D"]:
    """Returns x^T dy over each shard of the batch, in float32; nothing is sent between devices yet."""
    parts = math.gcd(sharding.batch_shards(), x.shape[0]) if x.ndim > 1 else 1
    if parts == 1:
        return jnp.einsum("...k,...d->kd", x, dy, preferred_element_type=jnp.float32)[None]
    x_GTK, dy_GTD = (sharding.by_batch(a.reshape(parts, -1, a.shape[-1])) for a in (x, dy))
    g_GKD = jnp.einsum("gtk,gtd->gkd", x_GTK, dy_GTD, preferred_element_type=jnp.float32)
    return sharding.by_batch(g_GKD, widths=2)


def outers_by_parts(
    x: Float[Array, "B *T K"], dy: Float[Array, "B *T N D"], divided: bool
) -> Float[Array, "G K N D"]:
    """Returns `outer_by_parts` of N kernels as one product, where `tensor` divides D or not."""
    if divided and dy.shape[-2] > 1:
        return sharding.unflat(outer_by_parts(x, sharding.flat(dy)), dy.shape[-2])
    g_GKD = outer_by_parts(x, dy.reshape(*dy.shape[:-2], -1))
    return g_GKD.reshape(*g_GKD.shape[:-1], *dy.shape[-2:])


def in_parts(function: Callable[[Array], Any], g: Array, axis: int, width: int) -> Any:
    """Returns a linear function of products (G, ...), of a width that `tensor` divides in more parts.

    Args:
      function: of products with the complete width, to arrays (G, ...).
      g: products of x and dy in parts, as of `outer_by_parts`.
      axis: the axis of g with the width.
      width: the kernel's width if `tensor` divides it, else 0.

    Returns:
      What the function gives, or its parts (tensor G, ...), whose sum that is.
    """
    if not width:
        return function(g)
    parts = sharding.by_width(function, g, axis, width)
    return jax.tree.map(lambda a: sharding.one_each(a.reshape(-1, *a.shape[2:])), parts)


def check_dropout(rate: float) -> None:
    """Raises InputError unless the rate lies in [0, 1)."""
    if not 0 <= rate < 1:
        raise InputError(f"dropout lies in [0, 1), not {rate}")


def check_rank(what: str, rank: int) -> None:
    """Raises InputError unless a rank, or a multiple to align to, is one that a kernel may have."""
    if type(rank) is not int:
        raise InputError(f"{what} is an integer, not {rank!r}")
    if rank < 1:
        raise InputError(f"{what} is at least 1, not {rank}")
    if rank > _LARGEST_RANK:
        raise InputError(f"{what} is at most {_LARGEST_RANK:,}, not {rank}")


def check_alpha(alpha: float | None) -> None:
    """Raises InputError unless alpha is finite and above 0, so that adapters do something, or None."""
    if alpha is not None and not 0 < alpha < math.inf:
        raise InputError(f"alpha is finite and above 0, not {alpha}")
    check_float32("alpha", alpha or 0.0)
