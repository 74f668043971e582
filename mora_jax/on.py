"""What is done with a parameter: `On`, which names the axes of a kernel, and choices as plain data."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float

from mora_jax import methods as method_table
from mora_jax.errors import InputError
from mora_jax.methods.base import Method

CHOICES = "a Method, On(method, inputs=..., stack=...), 'train' or 'frozen'"


@dataclasses.dataclass(frozen=True)
class On:
    """A method on a kernel whose axes are named; all axes that are not named are outputs.

    | kernel | shape | as |
    |---|---|---|
    | dense layer | (in, out) | `method`, without `On` |
    | attention's query, key or value | (D, heads, head width) | `On(method, inputs=(0,))` |
    | attention's output | (heads, head width, D) | `On(method, inputs=(0, 1))` |
    | scanned layers | (L, in, out) | `On(method, stack=(0,))` |
    | PyTorch's order | (out, in) | `On(method, inputs=(1,))` |
    | embedding table, looked up or attended to | (V, D) | `On(method, inputs=(1,))` |

    Attributes:
      method: how each kernel is updated.
      inputs: axes that a product contracts, in the order in which they are flattened to k inputs.
      stack: axes that count separate kernels, such as layers. Each kernel has arrays of its own.

    Example:
      >>> from mora_jax import LoRA, On
      >>> axes = On(LoRA(8), inputs=(0, 1)).axes((12, 64, 768))
      >>> axes.k, axes.d
      (768, 768)
    """

    method: Method
    inputs: tuple[int, ...] = (-2,)
    stack: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.method, Method):
            raise InputError(f"On takes a method such as MoRA(rank=8), not {self.method!r}")
        for name in ("inputs", "stack"):
            axes = getattr(self, name)
            if not isinstance(axes, Sequence) or not all(type(axis) is int for axis in axes):
                raise InputError(f"On's {name} is a tuple of axes such as (0,), not {axes!r}")
            object.__setattr__(self, name, tuple(axes))
        if not self.inputs:
            raise InputError("On's inputs name at least one axis")

    def axes(self, shape: Sequence[int]) -> "Axes":
        """Returns the roles of the axes of a kernel of this shape.

        Raises:
          InputError: if an axis does not exist or has two roles, or no axis is left for the outputs.
        """
        n = len(shape)
        if any(not -n <= axis < n for axis in (*self.inputs, *self.stack)):
            raise InputError(f"{self} names an axis that a kernel of shape {tuple(shape)} does not have")
        inputs, stack = (tuple(axis % n for axis in axes) for axes in (self.inputs, self.stack))
        outputs = tuple(axis for axis in range(n) if axis not in inputs + stack)
        if len({*inputs, *stack}) < len(inputs) + len(stack):
            raise InputError(f"{self} names an axis of a kernel of shape {tuple(shape)} twice")
        if not outputs:
            raise InputError(f"{self} leaves no axis for the outputs of a kernel of shape {tuple(shape)}")
        return Axes(tuple(shape), inputs, outputs, stack)

    def __str__(self) -> str:
        return f"On({self.method.name}, inputs={self.inputs}, stack={self.stack})"


@dataclasses.dataclass(frozen=True)
class Axes:
    """The roles of a kernel's axes, each an axis of `shape`."""

    shape: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    stack: tuple[int, ...]

    @property
    def k(self) -> int:
        """Inputs of one kernel."""
        return math.prod(self.sizes(self.inputs))

    @property
    def d(self) -> int:
        """Outputs of one kernel."""
        return math.prod(self.sizes(self.outputs))

    def sizes(self, axes: Sequence[int]) -> tuple[int, ...]:
        """Returns the widths of some axes."""
        return tuple(self.shape[axis] for axis in axes)

    def matrices(self, w: Array) -> Float[Array, "*L K D"]:
        """Returns a kernel of `shape` as matrices (inputs, outputs), one for each element of the stack."""
        w = jnp.transpose(w, (*self.stack, *self.inputs, *self.outputs))
        return w.reshape(*self.sizes(self.stack), self.k, self.d)

    def kernel(self, matrices: Float[Array, "*L K D"]) -> Array:
        """Returns the kernel of `shape` that `matrices` made into matrices."""
        order = (*self.stack, *self.inputs, *self.outputs)
        return jnp.transpose(matrices.reshape(self.sizes(order)), [order.index(i) for i in range(len(order))])

    def describe(self) -> str:
        """Returns the shape as a method sees it, such as "24 x (768, 2304)"."""
        stack = "".join(f"{n} x " for n in self.sizes(self.stack))
        return f"{stack}({self.k}, {self.d})"


Choice: TypeAlias = Method | On | Literal["train", "frozen"]


def method_of(choice: Choice) -> Method | None:
    """Returns the method of a choice, None for "train" and "frozen"."""
    choice = choice.method if isinstance(choice, On) else choice
    return choice if isinstance(choice, Method) else None


def choice_to_json(choice: Choice) -> Any:
    """Returns plain data, from which `choice_from_json` makes an equal choice."""
    if isinstance(choice, On):
        method = method_table.to_json(choice.method)
        return {"method": method, "inputs": list(choice.inputs), "stack": list(choice.stack)}
    return method_table.to_json(choice) if isinstance(choice, Method) else choice


def choice_from_json(data: Any) -> Choice:
    """Returns a rule's choice from YAML or JSON.

    Args:
      data: "train", "frozen", a mapping with a method's name and fields, or a mapping with such a mapping as
        `method`, and the axes `inputs` and `stack` of `On`.

    Raises:
      InputError: for anything else.
    """
    if data in ("train", "frozen"):
        return data
    if isinstance(data, str):
        raise InputError(f"a rule's value is 'train', 'frozen' or a method, not {data!r}")
    if not isinstance(data, Mapping) or not isinstance(data.get("method"), Mapping):
        return method_table.from_json(data)
    if extra := data.keys() - {"method", "inputs", "stack"}:
        raise InputError(f"a rule has method, inputs and stack, not {sorted(map(str, extra))[0]}")
    return On(method_table.from_json(data["method"]), data.get("inputs", (-2,)), data.get("stack", ()))
