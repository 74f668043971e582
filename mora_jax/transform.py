"""The transform over parameter trees: choose a method for each kernel, attach, bind, merge, restart.

Three things stand side by side. `params` is the model's own tree. `adapters` is a nested dict of arrays and
nothing else, at the paths of the kernels they adapt. `methods` says what each array means; it is static and
hashable, travels as an argument of the jitted step and is saved as JSON, so that no pytree's structure ever
depends on it.
"""

import dataclasses
import functools
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
# Flax's names of parameters that no layer multiplies its input with; stacked ones have two axes as well.
NO_KERNELS = ("scale", "bias", "embedding")


@dataclasses.dataclass(frozen=True)
class Methods:
    """What is done with every parameter: a static map from path to a method, "train" or "frozen"."""

    choices: tuple[tuple[str, Choice], ...]

    def __getitem__(self, path: str) -> Choice:
        return dict(self.choices)[path]

    def adapted(self) -> Iterator[tuple[str, Method]]:
        """The kernels that have an adapter, each with its method."""
        return ((path, choice) for path, choice in self.choices if isinstance(choice, Method))

    def trained(self) -> frozenset[str]:
        """The paths of the parameters that are trained themselves."""
        return frozenset(path for path, choice in self.choices if choice == "train")

    def after_restart(self) -> "Methods":
        """The methods that follow a restart."""
        return Methods(tuple((p, c.after_restart() if isinstance(c, Method) else c) for p, c in self.choices))

    def to_json(self) -> dict[str, Any]:
        """Plain data, from which `from_json` makes an equal object."""
        return {p: method_table.to_json(c) if isinstance(c, Method) else c for p, c in self.choices}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Methods":
        """The inverse of `to_json`. Raises InputError for what is no choice."""
        return Methods(tuple((path, choice_from_json(choice)) for path, choice in data.items()))


def choice_from_json(data: Any) -> Choice:
    """A rule's value as YAML has it: "train", "frozen", or a mapping with a method's name and fields."""
    if data in ("train", "frozen"):
        return data
    if isinstance(data, str):
        raise InputError(f"a rule's value is 'train', 'frozen' or a method, not {data!r}")
    return method_table.from_json(data)


def assign(rules: Rules, params: Tree) -> Methods:
    """Chooses for every parameter by the first rule whose regex matches its whole path.

    Args:
      rules: pairs of (regex, choice); a choice is a Method, "train" (the parameter itself) or "frozen".
      params: the model's parameters, or their shapes.

    Raises:
      InputError: a rule decides nothing, a parameter is covered by no rule, or a method is given to a
        parameter that is no kernel (fewer than two axes, or a scale, bias or embedding by its name).
    """
    flat = trees.flatten(params)
    choices = trees.first_match(rules, flat)
    for path, choice in choices.items():
        if isinstance(choice, Method) and (len(flat[path].shape) < 2 or _last(path) in NO_KERNELS):
            raise InputError(
                f"{choice.name} adapts kernels (..., in, out); {path!r} has shape {flat[path].shape}"
            )
    return Methods(tuple(choices.items()))


def attach(key: PRNGKeyArray, params: Tree, methods: Methods) -> Tree:
    """The adapters' arrays at the start, each stack of layers initialised layer by layer.

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
    """A tree with an `Adapter` at each adapted kernel's path: the model's second variable collection."""
    return trees.unflatten({path: Adapter(a, m) for path, m, a in _adapters(adapters, methods)})


def merge(params: Tree, adapters: Tree, methods: Methods) -> Tree:
    """The parameters with every adapter merged into its kernel, in float32.

    Kernels are returned in their own type; a base of lower precision than float32 rounds the update.
    """
    flat = trees.flatten(params)
    for path, method, arrays in _adapters(adapters, methods):
        w = flat[path]
        flat[path] = _each_layer(method.weight, arrays, w.astype(jnp.float32)).astype(w.dtype)
    return trees.unflatten(flat)


def restart(key: PRNGKeyArray, params: Tree, adapters: Tree, methods: Methods) -> tuple[Tree, Tree, Methods]:
    """Merges, initialises the adapters anew and moves every method on (MoRA's share switches its group type).

    The model's outputs are unchanged. The optimizer's state of the adapters is the caller's to reset.

    Returns:
      (params, adapters, methods) after the restart.
    """
    params = merge(params, adapters, methods)
    methods = methods.after_restart()
    return params, attach(key, params, methods), methods


def partition(params: Tree, adapters: Tree, methods: Methods) -> tuple[Tree, Tree]:
    """Splits all arrays into (trainable, frozen), each a tree {"params": ..., "adapters": ...}.

    `trees.combine` of the two gives {"params": params, "adapters": adapters} back.
    """
    trained = trainable_paths(methods)
    return trees.split({"params": params, "adapters": adapters}, trained.__contains__)


def labels(params: Tree, adapters: Tree, methods: Methods) -> Tree:
    """The optimizer group of every trainable leaf, in the structure of `partition`'s first tree.

    "base" for the model's own parameters; "adapter" for adapters, with the multiple of the learning rate
    behind it where that is not 1: "adapter*16.0".
    """
    groups = trainable_paths(methods)
    flat = trees.flatten({"params": params, "adapters": adapters})
    return trees.unflatten({path: groups[path] for path in flat if path in groups})


def trainable_paths(methods: Methods) -> dict[str, str]:
    """Every trainable leaf's path, under `params/` or `adapters/`, with its optimizer group."""
    groups = {f"params/{path}": "base" for path in methods.trained()}
    for path, method in methods.adapted():
        for name, leaf in method.leaves().items():
            if leaf.trainable:
                scale = "" if leaf.lr_scale == 1 else f"*{leaf.lr_scale}"
                groups[f"adapters/{path}/{name}"] = f"adapter{scale}"
    return groups


def is_adapter_group(label: str) -> bool:
    """Whether an optimizer group, as `labels` names it, holds adapters."""
    return label.startswith("adapter")


def lr_scale(label: str) -> float:
    """The multiple of the learning rate of an optimizer group, as `labels` names it."""
    return float(label.partition("*")[2] or 1.0)


def _adapters(adapters: Tree, methods: Methods) -> Iterator[tuple[str, Method, dict[str, Any]]]:
    flat = trees.flatten(adapters)
    for path, method in methods.adapted():
        yield path, method, {name: flat[f"{path}/{name}"] for name in method.leaves()}


def _last(path: str) -> str:
    return path.rpartition("/")[2]


def _init(key: PRNGKeyArray, method: Method, w: Any) -> dict[str, Any]:
    stack = w.shape[:-2]
    if not stack:
        return method.init(key, w)
    layers = w.reshape(-1, *w.shape[-2:])
    arrays = jax.vmap(method.init)(jax.random.split(key, layers.shape[0]), layers)
    return jax.tree.map(lambda a: a.reshape(*stack, *a.shape[1:]), arrays)


def _each_layer(function: Callable[..., Array], arrays: dict[str, Array], w: Array) -> Array:
    """The kernels of a stack after a function of their adapters' arrays and themselves.

    On a mesh layers come one after another, in place: one gathers what it needs at a time.
    """
    if w.ndim == 2:
        return function(arrays, w)
    inner = functools.partial(_each_layer, function)
    if not sharding.in_use():
        return jax.vmap(inner)(arrays, w)

    def one(i: Array, w: Array) -> Array:
        return w.at[i].set(inner(jax.tree.map(lambda a: a[i], arrays), w[i]))

    return jax.lax.fori_loop(0, w.shape[0], one, w)
