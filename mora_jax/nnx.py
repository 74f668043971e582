"""Adapters for Flax NNX: a model of the same class whose kernels have adapters.

    from flax import nnx
    from mora_jax import MoRA, nnx as mora_nnx
    from mora_jax.nnx import AdapterParam

    model = mora_nnx.adapt(model, [(".*/kernel", MoRA(8)), (".*", "frozen")], rngs)
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=AdapterParam)

    @nnx.jit
    def step(model, optimizer, batch):
        gradient_of = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, AdapterParam))
        loss, gradients = gradient_of(model, batch)
        optimizer.update(model, gradients)
        return loss

    model, optimizer = mora_nnx.restarted(model, optimizer, rngs)  # ReMoRA
    plain = mora_nnx.merged(model)

An adapted model computes what `merged` of it computes, whatever its code does with the attribute of a kernel.
Only `nnx.state`, `nnx.split` and the like see the stored kernel and the adapter beside it. The methods are
static attributes of its modules, so a compiled step is compiled again when a restart changes them.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import optax
from flax import nnx
from jaxtyping import Array

from mora_jax import moments, report, transform, trees
from mora_jax.errors import InputError, nearest, some
from mora_jax.frontends import modules
from mora_jax.frontends.modules import AdapterParam, FixedAdapterParam
from mora_jax.moments import is_partition
from mora_jax.on import Choice, On
from mora_jax.state import scaled
from mora_jax.transform import Group, Methods, Rules

__all__ = [
    "AdapterParam",
    "FixedAdapterParam",
    "adapt",
    "describe",
    "merged",
    "methods",
    "optimizer",
    "restarted",
    "trainable",
]

M = TypeVar("M")
# Metadata of parameters that are trained themselves.
TRAINED = "mora_trained"


def adapt(model: M, rules: Rules | Methods, rngs: nnx.Rngs) -> M:
    """Returns a model of the same class with adapters; the given one stays as it is.

    Each kernel's module holds the adapter's arrays beside it, such as `kernel_m_RR`: `AdapterParam`s, or
    `FixedAdapterParam`s where the method does not train them. Arrays of a stacked kernel have the stack's
    axes first, so that `nnx.scan` and `nnx.vmap` over axis 0 slice both alike. Nothing fits adapters to
    gradients: the bases of `Spectral()` are random, and each restart draws others.

    Args:
      model: an NNX module.
      rules: pairs of (regex, choice) as for `mora_jax.assign`, over the paths of `nnx.Param`s such as
        `layers/0/attn/query/kernel`. The filter `trainable` selects what "train" names, and the adapters. Or
        the `methods` of another model, for instance to restore one that was restarted.
      rngs: its `params` stream gives the adapters' random key.

    Raises:
      InputError: as `assign` does; if a method has dropout, which an NNX model cannot apply, or draws from
        gradients, as `Spectral(bases="sampled")`; if the model has adapters already; if a kernel is no
        attribute of a module, but lies in a list or dict, or is the kernel of an `nnx.WeightNorm` or
        `nnx.SpectralNorm`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mora_jax import MoRA, nnx as mora_nnx
      >>> rules = [("kernel", MoRA(2)), (".*", "frozen")]
      >>> model = mora_nnx.adapt(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), rules, nnx.Rngs(1))
      >>> model.kernel_m_RR.shape, model(jnp.ones((2, 8))).shape
      ((4, 4), (2, 4))
    """
    if any(isinstance(module, modules.Adapted) for module in modules.modules(model)):
        raise InputError("the model has adapters already: merge them first")
    model = nnx.clone(model)
    params = {path: variable.get_raw_value() for path, variable in _params(model).items()}
    tree = trees.unflatten(params)
    chosen = rules if isinstance(rules, Methods) else transform.assign(rules, tree)
    if unknown := [path for path, _ in chosen.choices if path not in params]:
        names = some([repr(path) for path in unknown])
        raise InputError(f"the model has no {names}{nearest(unknown[0], params)}")
    for path, method in chosen.adapted():
        if method.dropout:
            raise InputError(f"{path}: NNX models apply no dropout of {method.name}'s inputs; set it to 0")
        if method.oriented_needs_key:
            raise InputError(
                f"{path}: nothing fits the adapters of an NNX model to gradients, which {method} draws from"
            )
    _check_wrappers(model, dict(chosen.adapted()))
    _install(model, chosen, trees.flatten(transform.attach(rngs.params(), tree, chosen)))
    return model


def _check_wrappers(model: Any, adapted: Mapping[str, Any]) -> None:
    """Raises InputError if a kernel lies below a module that changes the stored kernels of other modules."""
    for path, module in nnx.iter_graph(model):
        if isinstance(module, nnx.WeightNorm | nnx.SpectralNorm):
            prefix = "".join(f"{key}/" for key in path)
            if below := [name for name in adapted if name.startswith(prefix)]:
                raise InputError(
                    f"{below[0]} is normalised by an nnx.{type(module).__name__}: adapt another kernel"
                )


def merged(model: M) -> M:
    """Returns the plain model with every adapter merged into its kernel, in float32.

    Classes, types of parameters and shardings are those of the model before `adapt`, so a base of lower
    precision than float32 rounds the update.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mora_jax import LoRA, nnx as mora_nnx
      >>> model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
      >>> adapted = mora_nnx.adapt(model, [("kernel", LoRA(2)), (".*", "frozen")], nnx.Rngs(1))
      >>> nnx.graphdef(mora_nnx.merged(adapted)) == nnx.graphdef(model)
      True
    """
    model, params, adapters, chosen = _taken_apart(model)
    _set(model, transform.merge(params, adapters, chosen), chosen)
    return model


def restarted(
    model: M, optimizer: nnx.Optimizer, rngs: nnx.Rngs, how: moments.Clear = "reset", share: float = 0.9
) -> tuple[M, nnx.Optimizer]:
    """Merges the adapters, initialises new ones, switches the methods and clears the adapters' moments.

    The model's outputs do not change. Learning rate schedules continue, and so does the state of parameters
    that are trained themselves. Both results are new objects. Partially applied functions such as those of
    `nnx.cached_partial` hold the old ones, and have to be made again.

    Args:
      model: a model with adapters.
      optimizer: an optimizer of its `AdapterParam`s, or the one that `mora_nnx.optimizer` returned.
      rngs: random keys of the new adapters, and of pruning.
      how: "reset" starts the adapters' optimizer state anew; "magnitude" and "random" zero a share of Adam's
        moments; "mean" zeroes the first moments and averages the second ones over each kernel.
      share: share to prune, in [0, 1].

    Returns:
      The new model and the new optimizer.

    Raises:
      InputError: if a method has no update to merge and continue from, as DoRA; if the optimizer has one
        state for adapters and other parameters.

    Example:
      >>> import optax
      >>> from flax import nnx
      >>> from mora_jax import MoRA, nnx as mora_nnx
      >>> rngs = nnx.Rngs(0)
      >>> model = mora_nnx.adapt(nnx.Linear(8, 4, rngs=rngs), [("kernel", MoRA(2)), (".*", "frozen")], rngs)
      >>> optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=mora_nnx.AdapterParam)
      >>> model, optimizer = mora_nnx.restarted(model, optimizer, rngs)
      >>> mora_nnx.methods(model)["kernel"].pattern
      '1'
    """
    new, params, adapters, chosen = _taken_apart(model)
    chosen.check_restart()
    params, adapters, after = transform.restart(rngs.params(), params, adapters, chosen)
    _set(new, params, chosen)
    _install(new, after, trees.flatten(adapters))
    return new, _cleared(new, optimizer, rngs, how, share)


def optimizer(
    model: Any,
    tx: optax.GradientTransformation | Callable[[Group], optax.GradientTransformation],
    wrt: Any = None,
) -> nnx.Optimizer:
    """Returns an optimizer of a model's trainable arrays, with a state of its own for each group of them.

    Use it where a method asks for a learning rate of its own (LoRA+), where other parameters are trained
    beside the adapters, or to treat groups differently. `nnx.Optimizer(model, tx, wrt=AdapterParam)` does
    elsewhere.

    Args:
      model: a model with adapters.
      tx: a transformation for all groups, or a function that returns one for a `Group`: its `adapter` and
        `weight_decay` say what may be treated differently.
      wrt: a filter of what is trained; by default `trainable`.

    Example:
      >>> import optax
      >>> from flax import nnx
      >>> from mora_jax import LoRA, nnx as mora_nnx
      >>> rules = [("kernel", LoRA(2, b_lr_scale=16.0)), ("bias", "train")]
      >>> model = mora_nnx.adapt(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), rules, nnx.Rngs(1))
      >>> sorted(mora_nnx.optimizer(model, optax.adam(1e-3)).opt_state.inner_states)
      ['adapter', 'adapter*16.0', 'base']
    """
    groups = _groups(model)
    by_label: dict[Hashable, optax.GradientTransformation] = {
        group.label: scaled(tx, group) for group in {*groups.values(), Group(adapter=False)}
    }

    def labels(arrays: Any) -> Any:
        def label(path: Any, _: Any) -> str:
            return groups.get(trees.written(path), Group(adapter=False)).label

        return jax.tree_util.tree_map_with_path(label, arrays, is_leaf=lambda x: isinstance(x, nnx.Variable))

    return nnx.Optimizer(model, optax.partition(by_label, labels), wrt=trainable if wrt is None else wrt)


def trainable(path: Any, value: Any) -> bool:
    """Returns whether a variable is trained: an NNX filter, `nnx.DiffState(0, mora_nnx.trainable)`."""
    return isinstance(value, AdapterParam) or (
        isinstance(value, nnx.Variable) and value.has_metadata(TRAINED) and value.get_metadata(TRAINED)
    )


def methods(model: Any) -> Methods:
    """Returns what is done with each parameter of a model with adapters, for `adapt` and for saving as JSON.

    Example:
      >>> from flax import nnx
      >>> from mora_jax import LoRA, nnx as mora_nnx
      >>> rules = [("kernel", LoRA(2)), ("bias", "train")]
      >>> mora_nnx.methods(mora_nnx.adapt(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), rules, nnx.Rngs(1)))["bias"]
      'train'
    """
    ons = {id(kernel): on for kernel, on, _ in _kernels(model)}

    def choice(variable: nnx.Variable) -> Choice:
        on = ons.get(id(variable))
        if on is None:
            return "train" if trainable((), variable) else "frozen"
        return on.method if (variable.ndim, on.inputs) == (2, (0,)) else on

    return Methods(tuple((path, choice(variable)) for path, variable in _params(model).items()))


def describe(model: Any) -> str:
    """Returns a table of every parameter: path, shape, how its method sees it, and numbers trained."""
    params = {path: variable.get_raw_value() for path, variable in _params(model).items()}
    return report.describe(trees.unflatten(params), methods(model))


def _params(model: Any) -> dict[str, nnx.Variable]:
    """Returns the parameters of the plain model by path, each once."""
    return {
        "/".join(map(str, path)): node
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Param) and not isinstance(node, AdapterParam | FixedAdapterParam)
    }


def _kernels(model: Any) -> Iterator[tuple[nnx.Variable, On, dict[str, nnx.Variable]]]:
    return (parts for module in modules.modules(model) for parts in modules.kernels(module))


def _install(model: Any, chosen: Methods, arrays: Mapping[str, Array]) -> None:
    """Gives every module its adapters. Modules that share a kernel share the adapter."""
    params = _params(model)
    adapters: dict[int, tuple[On, Mapping[str, nnx.Variable]]] = {}
    for path, on in chosen.kernels():
        leaves = on.method.leaves()
        variables = {
            name: (AdapterParam if leaf.trainable else FixedAdapterParam)(arrays[f"{path}/{name}"])
            for name, leaf in leaves.items()
        }
        adapters[id(params[path])] = on, variables
    for path in chosen.trained():
        params[path].set_metadata(TRAINED, True)
    owned = set()
    for module in list(modules.modules(model)):
        own = {
            name: adapters[id(value)]
            for name, value in vars(module).items()
            if isinstance(value, nnx.Variable) and id(value) in adapters
        }
        if own:
            owned |= {id(vars(module)[name]) for name in own}
            modules.adopt(module, own)
    if lost := [repr(path) for path, _ in chosen.kernels() if id(params[path]) not in owned]:
        raise InputError(f"{some(lost)}: kernels in a list or dict cannot be adapted: make them attributes")


def _taken_apart(model: M) -> tuple[M, Any, Any, Methods]:
    """Returns a plain copy of a model, its parameters, the arrays of its adapters, and its methods."""
    chosen, model = methods(model), nnx.clone(model)
    found = {id(kernel): arrays for kernel, _, arrays in _kernels(model)}
    params = _params(model)
    arrays = {
        f"{path}/{name}": variable.get_raw_value()
        for path, _ in chosen.kernels()
        for name, variable in found[id(params[path])].items()
    }
    for module in list(modules.modules(model)):
        if isinstance(module, modules.Adapted):
            modules.release(module)
    for variable in params.values():
        if variable.has_metadata(TRAINED):
            variable.del_metadata(TRAINED)
    tree = trees.unflatten({path: variable.get_raw_value() for path, variable in params.items()})
    return model, tree, trees.unflatten(arrays), chosen


def _set(model: Any, params: Any, chosen: Methods) -> None:
    """Sets the kernels that had adapters."""
    variables, values = _params(model), trees.flatten(params)
    for path, _ in chosen.kernels():
        variables[path].set_raw_value(values[path])


def _groups(model: Any) -> dict[str, Group]:
    """Returns the optimizer group of every trained variable, by its path."""
    groups = {}
    for path, group in methods(model).trainable().items():
        kind, _, path = path.partition("/")
        # The variable of an array lies beside its kernel, such as up/kernel_m_RR for up/kernel/m_RR.
        groups["_".join(path.rsplit("/", 1)) if kind == "adapters" else path] = group
    return groups


def _cleared(
    model: Any, old: nnx.Optimizer, rngs: nnx.Rngs, how: moments.Clear, share: float
) -> nnx.Optimizer:
    """Returns an optimizer whose state of adapters is cleared."""
    if "model" in vars(old):
        raise InputError("restarted takes an nnx.Optimizer, which does not hold the model")
    trained = nnx.state(model, old.wrt)
    old_state, fresh = nnx.as_pure(old.opt_state), nnx.as_pure(old.tx.init(trained))
    labels = {group.label for group in _groups(model).values() if group.adapter}
    parted = [node for node in jax.tree.leaves(old_state, is_leaf=is_partition) if is_partition(node)]
    if labels <= {label for node in parted for label in node.inner_states}:
        cleared = moments.clear(old_state, fresh, labels, how, share, rngs.params())
    elif all(isinstance(variable, AdapterParam) for _, variable in nnx.to_flat_state(trained)):
        whole, new_whole = (optax.transforms.PartitionState({"all": s}) for s in (old_state, fresh))
        cleared = moments.clear(whole, new_whole, {"all"}, how, share, rngs.params())
        cleared = cleared.inner_states["all"]
    else:
        raise InputError("the optimizer has one state for adapters and others: use mora_nnx.optimizer")
    new = nnx.clone(old)
    nnx.update(new.opt_state, nnx.state(cleared))
    return new
