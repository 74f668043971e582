"""The transform over parameter trees: assign a method to each kernel, attach, bind, merge, restart.

Three things stand side by side. `params` is the model's own tree. `adapters` is a nested dict of arrays and
nothing else, at the paths of the kernels they adapt. `methods` says what each array means. It is static and
hashable, is passed to the jitted step as a static argument and is saved as JSON, so no pytree's structure
depends on it.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, PRNGKeyArray

from mora_jax import sharding, trees
from mora_jax.errors import InputError, nearest, some
from mora_jax.methods.base import Bound, Method
from mora_jax.on import CHOICES, Choice, On, choice_from_json, choice_to_json

Rules: TypeAlias = Sequence[tuple[str, Choice]]
Params: TypeAlias = Any  # any pytree of arrays
Tree: TypeAlias = dict[str, Any]
# Flax's names of parameters that a bare method cannot be meant for: they multiply no input.
NO_KERNELS = ("scale", "bias", "embedding")


@dataclasses.dataclass(frozen=True)
class Methods:
    """Says what is done with every parameter: a static map from path to a choice.

    A choice is a Method on a kernel (in, out), `On`, "train" (the parameter itself) or "frozen".
    """

    choices: tuple[tuple[str, Choice], ...]

    def __getitem__(self, path: str) -> Choice:
        return dict(self.choices)[path]

    def kernels(self) -> Iterator[tuple[str, On]]:
        """Returns the paths of the adapted kernels, each with its method and the roles of its axes."""
        for path, choice in self.choices:
            if isinstance(choice, Method | On):
                yield path, choice if isinstance(choice, On) else On(choice)

    def adapted(self) -> Iterator[tuple[str, Method]]:
        """Returns the paths of the adapted kernels, each with its method."""
        return ((path, on.method) for path, on in self.kernels())

    def orientable(self) -> Iterator[tuple[str, On]]:
        """Returns the kernels whose adapters `orient` fits to gradients."""
        return ((path, on) for path, on in self.kernels() if on.method.orients)

    def trained(self) -> frozenset[str]:
        """Returns the paths of the parameters that are trained themselves."""
        return frozenset(path for path, choice in self.choices if choice == "train")

    def after_restart(self, restarts: int = 1) -> "Methods":
        """Returns the methods that follow a restart, or several."""
        return Methods(tuple((path, _after_restart(choice, restarts)) for path, choice in self.choices))

    def check_restart(self) -> None:
        """Raises InputError for a method that has no update to merge and continue from, as DoRA."""
        for path, method in self.adapted():
            if method.restart_effect == "no":
                raise InputError(f"{path}: {method.name} cannot be restarted")

    def trainable(self) -> dict[str, "Group"]:
        """Returns the optimizer group of every trainable array, by path under `params/` or `adapters/`."""
        # Parameters that are one array have an empty path.
        groups = {f"params/{path}".rstrip("/"): Group(adapter=False) for path in self.trained()}
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
        return {path: choice_to_json(choice) for path, choice in self.choices}

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

    @property
    def label(self) -> str:
        """Name of the group's optimizer state, such as "base" or "adapter*16.0"."""
        scale = "" if self.lr_scale == 1 else f"*{self.lr_scale}"
        return f"{'adapter' if self.adapter else 'base'}{scale}{'' if self.weight_decay else ', undecayed'}"


def assign(rules: Rules, params: Params, stacked: str = "") -> Methods:
    """Assigns a choice to every parameter, by the first rule whose regex matches its full path.

    Args:
      rules: pairs of (regex, choice); a choice is a Method, `On` (a method on named axes), "train" (the
        parameter itself) or "frozen".
      params: the model's parameters as any pytree, or their shapes. Paths look like `a/b/0/kernel`.
      stacked: regex of the paths of stacked kernels (L, in, out): a Method on these means
        `On(method, stack=(0,))`.

    Raises:
      InputError: if a rule decides nothing, no rule covers a parameter, a choice is none, or a bare Method is
        assigned to what is no kernel (in, out): any other number of axes, or named scale, bias or embedding.

    Example:
      >>> import jax.numpy as jnp
      >>> from mora_jax import LoRA, MoRA, On, assign
      >>> params = {"query": jnp.ones((8, 2, 4)), "out": jnp.ones((8, 8)), "bias": jnp.ones(8)}
      >>> rules = [("query", On(MoRA(2), inputs=(0,))), ("out", LoRA(2)), (".*", "frozen")]
      >>> assign(rules, params)["bias"]
      'frozen'
    """
    if isinstance(rules, Mapping) or any(not isinstance(r, Sequence) or len(r) != 2 for r in rules):
        raise InputError(f"rules are a list of pairs (regex, choice), not {rules!r}")
    for _, choice in rules:
        if not isinstance(choice, Method | On) and choice not in ("train", "frozen"):
            raise InputError(f"a rule's choice is {CHOICES}, not {choice!r}")
    flat = trees.flatten(params)
    choices = {}
    for path, choice in trees.first_match(rules, flat).items():
        if isinstance(choice, Method) and stacked and re.fullmatch(stacked, path):
            choice = On(choice, stack=(0,))
        _check(path, choice, flat[path])
        choices[path] = choice
    return Methods(tuple(choices.items()))


def _check(path: str, choice: Choice, leaf: Any) -> None:
    if not hasattr(leaf, "shape"):
        raise InputError(f"{path} is no array but {leaf!r}")
    shape = tuple(leaf.shape)
    if choice != "frozen" and not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise InputError(f"{path} has type {leaf.dtype}: only floating arrays can be trained or adapted")
    if isinstance(choice, Method) and (len(shape) != 2 or path.rpartition("/")[2] in NO_KERNELS):
        raise InputError(
            f"{choice.name} adapts kernels (in, out), and {path!r} has shape {shape}: name its axes, as in "
            f"On(method, inputs=(0,)) for (D, heads, width) or On(method, stack=(0,)) for (L, in, out), or "
            f"choose 'train' or 'frozen'"
        )
    if isinstance(choice, Method | On):
        on = choice if isinstance(choice, On) else On(choice)
        try:
            axes = on.axes(shape)
            on.method.count(axes.k, axes.d)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error


def attach(key: PRNGKeyArray, params: Params, methods: Methods) -> Tree:
    """Initialises the adapters' arrays, each kernel of a stack by itself.

    Returns:
      A nested dict: the paths of the adapted kernels, then the names of the method's arrays.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from mora_jax import MoRA, assign, attach
      >>> params = {"up": {"kernel": jnp.ones((8, 8))}}
      >>> jax.tree.map(jnp.shape, attach(jax.random.key(0), params, assign([(".*", MoRA(2))], params)))
      {'up': {'kernel': {'m_RR': (5, 5)}}}
    """
    flat = trees.flatten(params)
    adapted = list(methods.kernels())
    keys = jax.random.split(key, max(len(adapted), 1))
    arrays = {
        f"{path}/{name}": array
        for key, (path, on) in zip(keys, adapted, strict=False)
        for name, array in _init(key, on.method, on.axes(flat[path].shape).matrices(flat[path])).items()
    }
    return trees.unflatten(arrays)


def bind(params: Params, adapters: Tree, methods: Methods) -> Params:
    """Returns the parameters with each adapted kernel joined to its adapter, for models that call `dense`.

    The place of a kernel then holds a `Bound`, which `dense` applies. Everything else that reads it raises an
    InputError, so no adapter is ignored. Models that do not call `dense` take `adapted` instead.

    Raises:
      InputError: if an adapted kernel is not laid out (in, out), with stacked axes before.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from mora_jax import MoRA, assign, attach, bind, dense
      >>> params = {"kernel": jnp.ones((8, 4))}
      >>> methods = assign([("kernel", MoRA(2))], params)
      >>> bound = bind(params, attach(jax.random.key(0), params, methods), methods)
      >>> dense(jnp.ones((2, 8)), [bound["kernel"]])[0].shape
      (2, 4)
    """
    flat = trees.flatten(params)
    bound = {}
    for path, on, arrays in adapters_of(params, adapters, methods):
        axes = on.axes(flat[path].shape)
        n = len(axes.shape)
        if axes.inputs != (n - 2,) or axes.stack != tuple(range(n - 2)):
            raise InputError(f"{path}: dense takes kernels (in, out), not {on}; use adapted, not bind")
        bound[path] = Bound(flat[path], arrays, on.method, path)
    return trees.replaced(params, bound)


def merge(params: Params, adapters: Tree, methods: Methods) -> Params:
    """Merges every adapter into its kernel, in float32, and returns the very tree of parameters.

    Containers, types and shardings stay, so a base of lower precision than float32 rounds the update.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from mora_jax import DoRA, assign, attach, merge
      >>> params = [{"kernel": jnp.ones((8, 4))}]
      >>> methods = assign([(".*", DoRA(2))], params)
      >>> adapters = attach(jax.random.key(0), params, methods)
      >>> bool(jnp.allclose(merge(params, adapters, methods)[0]["kernel"], 1))
      True
    """
    flat = trees.flatten(params)
    merged = {
        path: _like(flat[path], effective(on, arrays, flat[path]))
        for path, on, arrays in adapters_of(params, adapters, methods)
    }
    return trees.replaced(params, merged)


def effective(on: On, arrays: Mapping[str, Array], w: Array) -> Array:
    """Returns the effective kernel in w's shape, in float32 or w's wider type."""
    axes = on.axes(w.shape)
    matrices = axes.matrices(w).astype(jnp.promote_types(w.dtype, jnp.float32))
    return axes.kernel(_each_layer(on.method.weight, dict(arrays), matrices))


def restart(
    key: PRNGKeyArray, params: Params, adapters: Tree, methods: Methods
) -> tuple[Params, Tree, Methods]:
    """Merges the adapters, initialises new ones and replaces every method by its successor.

    MoRA's sharing switches its group type. The model's outputs do not change. The caller resets the adapters'
    optimizer state, as `State.restart` does.

    Returns:
      (params, adapters, methods) after the restart.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from mora_jax import MoRA, assign, attach, restart
      >>> params = {"kernel": jnp.ones((8, 4))}
      >>> methods = assign([(".*", MoRA(2))], params)
      >>> adapters = attach(jax.random.key(0), params, methods)
      >>> params, adapters, methods = restart(jax.random.key(1), params, adapters, methods)
      >>> methods["kernel"].pattern
      '1'
    """
    params = merge(params, adapters, methods)
    methods = methods.after_restart()
    return params, attach(key, params, methods), methods


def partition(params: Params, adapters: Tree, methods: Methods) -> tuple[Tree, Tree]:
    """Splits all arrays into (trainable, frozen), each a tree {"params": ..., "adapters": ...}.

    `combine` joins the two to {"params": params, "adapters": adapters} again. Entries of dicts that are not
    in a part are left out; in other containers None stands for them.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from mora_jax import MoRA, assign, attach, combine, partition
      >>> params = {"kernel": jnp.ones((8, 4)), "scale": jnp.ones(8)}
      >>> methods = assign([("kernel", MoRA(2)), (".*", "train")], params)
      >>> parts = partition(params, attach(jax.random.key(0), params, methods), methods)
      >>> [sorted(part["params"]) for part in parts], sorted(combine(*parts)["params"])
      ([['scale'], ['kernel']], ['kernel', 'scale'])
    """
    trained = methods.trainable()
    return trees.split({"params": params, "adapters": adapters}, trained.__contains__)


def labels(params: Params, adapters: Tree, methods: Methods) -> Tree:
    """Returns the optimizer `Group` of every trainable leaf, in the structure of `partition`'s first tree.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from mora_jax import LoRA, assign, attach, labels
      >>> params = {"w": jnp.ones((8, 4))}
      >>> methods = assign([("w", LoRA(2, b_lr_scale=4.0))], params)
      >>> found = labels(params, attach(jax.random.key(0), params, methods), methods)
      >>> found["adapters"]["w"]["b_RD"].lr_scale
      4.0
    """
    groups = methods.trainable()
    trainable, _ = partition(params, adapters, methods)
    return trees.replaced(trainable, {path: groups[path] for path in trees.flatten(trainable)})


def adapters_of(
    params: Params, adapters: Tree, methods: Methods
) -> Iterator[tuple[str, On, dict[str, Array]]]:
    """Returns path, method and arrays of every adapted kernel.

    Raises:
      InputError: if a kernel or an array is missing, an array has another shape than its method makes, or the
        adapters have arrays that the methods do not know.
    """
    kernels, arrays = trees.flatten(params), trees.flatten(adapters)
    known = {f"{path}/{name}" for path, on in methods.kernels() for name in on.method.leaves()}
    if unknown := sorted(arrays.keys() - known):
        raise InputError(f"the methods adapt nothing with {some(unknown)}, which the adapters hold")
    for path, on in methods.kernels():
        if path not in kernels:
            hint = nearest(path, kernels)
            raise InputError(f"the parameters have no {path!r}, which the methods adapt{hint}")
        names = {name: f"{path}/{name}" for name in on.method.leaves()}
        axes = on.axes(kernels[path].shape)
        if any(n not in arrays for n in names.values()):
            raise InputError(f"the adapters have no arrays of {on.method.name} for {path!r}")
        for name, shape in on.method.shapes(axes.k, axes.d).items():
            wanted, found = axes.sizes(axes.stack) + shape, arrays[names[name]].shape
            if found != wanted:
                raise InputError(f"{names[name]} has shape {found}, and {on.method} makes {wanted}")
        yield path, on, {name: arrays[n] for name, n in names.items()}


def _after_restart(choice: Choice, restarts: int) -> Choice:
    if isinstance(choice, On):
        return dataclasses.replace(choice, method=choice.method.after_restart(restarts))
    return choice.after_restart(restarts) if isinstance(choice, Method) else choice


def _like(old: Any, new: Array) -> Array:
    """Returns an array in the type of another, and on its devices if these are known."""
    new = new.astype(old.dtype)
    known = not any(isinstance(array, Tracer) for array in (old, new))
    return jax.device_put(new, old.sharding) if known and isinstance(old, jax.Array) else new


def _init(key: PRNGKeyArray, method: Method, w: Any) -> dict[str, Any]:
    stack = w.shape[:-2]
    keys = jax.random.split(key, math.prod(stack)).reshape(stack) if stack else key
    return _by_layer(method.init, keys, w)


def _by_layer(function: Callable[..., dict[str, Array]], first: Any, w: Any) -> dict[str, Array]:
    """Returns a function of a matrix and of something that belongs to it for each matrix of a stack.

    One after another: this saves memory, and XLA hangs on few CPU cores if several batches of decompositions
    run side by side.
    """
    if len(w.shape) == 2:
        return function(first, w)
    return jax.lax.map(lambda of: _by_layer(function, *of), (first, w))


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
