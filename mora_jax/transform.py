"""The transform over parameter trees: assign a method to each kernel, attach, bind, merge, restart.

Three things stand side by side. `params` is the model's own tree. `adapters` is a nested dict of arrays and
nothing else, at the paths of the kernels they adapt. `methods` says what each array means. It is static and
hashable, is passed to the jitted step as a static argument and is saved as JSON, so no pytree's structure
depends on it.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from mora_jax import methods as method_table
from mora_jax import sharding, trees
from mora_jax.errors import InputError
from mora_jax.methods.base import Adapter, Method

Choice: TypeAlias = Method | Literal["train", "frozen"]
Rules: TypeAlias = Sequence[tuple[str, Choice]]
Tree: TypeAlias = dict[str, Any]
# Flax's names of parameters that multiply no input. Stacked ones have two axes as well.
NO_KERNELS = ("scale", "bias", "embedding")


@dataclasses.dataclass(frozen=True)
class Methods:
    """Says what is done with every parameter: a static map from path to a method, "train" or "frozen"."""

    choices: tuple[tuple[str, Choice], ...]

    def __getitem__(self, path: str) -> Choice:
        return dict(self.choices)[path]

    def adapted(self) -> Iterator[tuple[str, Method]]:
        """Returns the paths of the adapted kernels, each with its method."""
        return ((path, choice) for path, choice in self.choices if isinstance(choice, Method))

    def trained(self) -> frozenset[str]:
        """Returns the paths of the parameters that are trained themselves."""
        return frozenset(path for path, choice in self.choices if choice == "train")

    def after_restart(self) -> "Methods":
        """Returns the methods that follow a restart."""
        return Methods(tuple((p, c.after_restart() if isinstance(c, Method) else c) for p, c in self.choices))

    def trainable(self) -> dict[str, "Group"]:
        """Returns the optimizer group of every trainable array, by path under `params/` or `adapters/`."""
        groups = {f"params/{path}": Group(adapter=False) for path in self.trained()}
        for path, method in self.adapted():
            for name, leaf in method.leaves().items():
                if leaf.trainable:
                    groups[f"adapters/{path}/{name}"] = Group(True, leaf.lr_scale, leaf.weight_decay)
        return groups

    def layouts(self) -> sharding.Rules:
        """Returns how the adapters' arrays may be divided over a mesh."""
        return tuple(
            (re.escape(f"{path}/{name}"), leaf.layout)
            for path, method in self.adapted()
            for name, leaf in method.leaves().items()
        )

    def to_json(self) -> dict[str, Any]:
        """Returns plain data, from which `from_json` makes an equal object."""
        return {p: method_table.to_json(c) if isinstance(c, Method) else c for p, c in self.choices}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Methods":
        """Returns the methods that `to_json` wrote. Raises InputError for an unknown choice."""
        return Methods(tuple((path, choice_from_json(choice)) for path, choice in data.items()))


@dataclasses.dataclass(frozen=True)
class Group:
    """How the optimizer treats some of the trainable arrays.

    Attributes:
      adapter: whether the arrays belong to adapters, whose optimizer state a restart resets.
      lr_scale: multiple of the learning rate.
      weight_decay: whether weight decay applies.
    """

    adapter: bool
    lr_scale: float = 1.0
    weight_decay: bool = True


def choice_from_json(data: Any) -> Choice:
    """Returns a rule's choice from YAML: "train", "frozen", or a mapping with a method's name and fields."""
    if data in ("train", "frozen"):
        return data
    if isinstance(data, str):
        raise InputError(f"a rule's value is 'train', 'frozen' or a method, not {data!r}")
    return method_table.from_json(data)


def assign(rules: Rules, params: Tree) -> Methods:
    """Assigns a choice to every parameter, by the first rule whose regex matches its full path.

    Args:
      rules: pairs of (regex, choice); a choice is a Method, "train" (the parameter itself) or "frozen".
      params: the model's parameters, or their shapes.

    Raises:
      InputError: if a rule decides nothing, no rule covers a parameter, or a method is assigned to what is no
        kernel (fewer than two axes, or named scale, bias or embedding).
    """
    flat = trees.flatten(params)
    choices = trees.first_match(rules, flat)
    for path, choice in choices.items():
        shape, name = flat[path].shape, path.rpartition("/")[2]
        if isinstance(choice, Method) and (len(shape) < 2 or name in NO_KERNELS):
            raise InputError(f"{choice.name} adapts kernels (..., in, out); {path!r} has shape {shape}")
    return Methods(tuple(choices.items()))


def attach(key: PRNGKeyArray, params: Tree, methods: Methods) -> Tree:
    """Initialises the adapters' arrays, each stack of layers layer by layer.

    Returns:
      A nested dict: the paths of the adapted kernels, then the names of the method's arrays.
    """
    flat = trees.flatten(params)
    adapted = list(methods.adapted())
    keys = jax.random.split(key, max(len(adapted), 1))
    arrays = {
        f"{path}/{name}": array
        for key, (path, method) in zip(keys, adapted, strict=False)
        for name, array in _init(key, method, flat[path]).items()
    }
    return trees.unflatten(arrays)


def bind(adapters: Tree, methods: Methods) -> Tree:
    """Returns a tree with an `Adapter` at each adapted kernel's path: the model's "adapter" collection."""
    return trees.unflatten({path: Adapter(a, m) for path, m, a in _adapters(adapters, methods)})


def merge(params: Tree, adapters: Tree, methods: Methods) -> Tree:
    """Merges every adapter into its kernel, in float32, and returns the parameters.

    Kernels keep their type, so a base of lower precision than float32 rounds the update.
    """
    flat = trees.flatten(params)
    for path, method, arrays in _adapters(adapters, methods):
        w = flat[path]
        flat[path] = _each_layer(method.weight, arrays, w.astype(jnp.float32)).astype(w.dtype)
    return trees.unflatten(flat)


def restart(key: PRNGKeyArray, params: Tree, adapters: Tree, methods: Methods) -> tuple[Tree, Tree, Methods]:
    """Merges the adapters, initialises new ones and replaces every method by its successor.

    MoRA's sharing switches its group type. The model's outputs do not change. The caller resets the adapters'
    optimizer state.

    Returns:
      (params, adapters, methods) after the restart.
    """
    params = merge(params, adapters, methods)
    methods = methods.after_restart()
    return params, attach(key, params, methods), methods


def partition(params: Tree, adapters: Tree, methods: Methods) -> tuple[Tree, Tree]:
    """Splits all arrays into (trainable, frozen), each a tree {"params": ..., "adapters": ...}.

    `combine` joins the two to {"params": params, "adapters": adapters} again.
    """
    trained = methods.trainable()
    return trees.split({"params": params, "adapters": adapters}, trained.__contains__)


def labels(params: Tree, adapters: Tree, methods: Methods) -> Tree:
    """Returns the optimizer `Group` of every trainable leaf, in the structure of `partition`'s first tree."""
    groups = methods.trainable()
    flat = trees.flatten({"params": params, "adapters": adapters})
    return trees.unflatten({path: groups[path] for path in flat if path in groups})


def _adapters(adapters: Tree, methods: Methods) -> Iterator[tuple[str, Method, dict[str, Any]]]:
    flat = trees.flatten(adapters)
    for path, method in methods.adapted():
        yield path, method, {name: flat[f"{path}/{name}"] for name in method.leaves()}


def _init(key: PRNGKeyArray, method: Method, w: Any) -> dict[str, Any]:
    stack = w.shape[:-2]
    if not stack:
        return method.init(key, w)
    layers = w.reshape(-1, *w.shape[-2:])
    arrays = jax.vmap(method.init)(jax.random.split(key, layers.shape[0]), layers)
    return jax.tree.map(lambda a: a.reshape(*stack, *a.shape[1:]), arrays)


def _each_layer(function: Callable[..., Array], arrays: dict[str, Array], w: Array) -> Array:
    """Applies a function of an adapter's arrays and a kernel to each kernel of a stack.

    On a mesh the layers are computed one by one, in place, so that only one is all-gathered at a time.
    """
    if w.ndim == 2:
        return function(arrays, w)
    inner = functools.partial(_each_layer, function)
    if not sharding.in_use():
        return jax.vmap(inner)(arrays, w)

    def one(i: Array, w: Array) -> Array:
        return w.at[i].set(inner(jax.tree.map(lambda a: a[i], arrays), w[i]))

    return jax.lax.fori_loop(0, w.shape[0], one, w)
