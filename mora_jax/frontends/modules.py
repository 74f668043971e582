"""NNX modules with adapters: classes that apply the adapters of their kernels, whatever their code does.

A module that owns an adapted kernel gets a subclass of its class (`adopt`). The kernel stays an attribute,
and the adapter's arrays lie beside it, so NNX's transforms treat them alike. Code sees more than is stored:

* A method of the module runs as a program with adapters, as in `adapted`: it is traced on a copy of the
  module in its original class, and evaluated with `Kernel`s. Changes of variables are carried over.
* Any other read of the kernel, such as a parent's, returns the effective kernel. So does a method that cannot
  be traced on a copy. The result is the same, at the cost of merging.

NNX itself reads the variables in `vars(module)`, and there the kernel is the stored one.
"""

import dataclasses
import functools
import inspect
import numbers
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import jax
import numpy as np
from flax import errors, nnx

from mora_jax.errors import InputError
from mora_jax.frontends.interpreter import evaluate, materialised
from mora_jax.frontends.kernel import Kernel
from mora_jax.methods.base import Arrays
from mora_jax.on import On

Function: TypeAlias = Callable[..., Any]
# Attribute of a module with adapters that holds a `Spec` for each of its adapted kernels.
SPECS = "_mora_specs"
CONTAINERS = (nnx.List, nnx.Dict)
# Errors of a method that is run on a copy and would not occur without.
UNTRACEABLE = (jax.errors.JAXTypeError, errors.TraceContextError)
# What a method may return beside arrays and is the same in every run.
CONSTANTS = (numbers.Number, str, bytes, np.ndarray, np.generic, np.dtype)


class AdapterParam(nnx.Param):
    """An array of an adapter that is trained."""


class FixedAdapterParam(nnx.Param):
    """An array of an adapter that is not trained, such as LoRA's a with `train_factors="b"`."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is static about an adapted kernel of a module.

    It is part of the graph definition, so a compiled function never meets another method than its own. It
    holds no path: layers that are alike have equal definitions.

    Attributes:
      name: the module's attribute.
      on: the method, and the roles of the stored kernel's axes, counted from the front.
      axes: number of axes of the stored kernel.
      shapes: shapes of one kernel's arrays, by name.
    """

    name: str
    on: On
    axes: int
    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @staticmethod
    def of(name: str, on: On, shape: tuple[int, ...], arrays: Arrays) -> "Spec":
        """Returns the spec of a kernel of this shape, with arrays for all of its stack."""
        axes, lead = on.axes(shape), len(on.stack)
        shapes = tuple((array, tuple(a.shape[lead:])) for array, a in sorted(arrays.items()))
        return Spec(name, On(on.method, axes.inputs, axes.stack), len(shape), shapes)

    def attribute(self, array: str) -> str:
        """Returns the attribute that holds an array of the adapter."""
        return f"{self.name}_{array}"

    def kernel(self, module: nnx.Pytree) -> Kernel:
        """Returns the kernel of a module with its adapter, ready to be applied.

        Raises:
          InputError: if a transform sliced the kernel and its adapter in different ways.
        """
        w = vars(module)[self.name].get_raw_value()
        arrays = {array: vars(module)[self.attribute(array)].get_raw_value() for array, _ in self.shapes}
        label = f"{type(module).__name__}.{self.name}"
        on = self._sliced(w, label)
        stack = on.axes(w.shape).sizes(on.stack)
        if any(arrays[array].shape != stack + shape for array, shape in self.shapes):
            found = {array: tuple(a.shape) for array, a in arrays.items()}
            raise InputError(
                f"{label} has shape {w.shape}, and its adapter's arrays have shapes {found}: let transforms "
                f"such as nnx.scan slice both alike, along axis 0"
            )
        groups = tuple((axis,) for axis in range(w.ndim))
        return Kernel(w, arrays, None, on, label, "auto", groups, w.dtype)

    def _sliced(self, w: jax.Array, label: str) -> On:
        """Returns the roles of the axes that are left inside of a scan or vmap over the first ones."""
        gone, on = self.axes - w.ndim, self.on
        if gone < 0 or on.stack[:gone] != tuple(range(gone)):
            raise InputError(
                f"{label} was adapted as {on} with {self.axes} axes, and has shape {w.shape} now: scan or "
                f"vmap over its first axes, named as stack"
            )
        return On(on.method, tuple(i - gone for i in on.inputs), tuple(i - gone for i in on.stack[gone:]))


class Adapted:
    """Marks the classes of modules that own adapted kernels."""

    __slots__ = ()  # Python changes an object's class only to one of the same layout


class EffectiveKernel:
    """An attribute of a class: reads as the effective kernel, while `vars` holds the stored one."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, module: Any, owner: type | None = None) -> Any:
        if module is None:
            return self
        stored = vars(module).get(self.name)
        spec = next((s for s in vars(module).get(SPECS, ()) if s.name == self.name), None)
        if stored is None or spec is None:
            raise AttributeError(f"{type(module).__name__} has no attribute {self.name!r}")
        value = spec.kernel(module).effective("code that reads the attribute")
        return view_type(type(stored)).from_metadata(value, stored.get_metadata())

    def __set__(self, module: Any, value: Any) -> None:
        vars(module)[self.name] = value

    def __delete__(self, module: Any) -> None:
        del vars(module)[self.name]


@functools.cache
def view_type(variable: type[nnx.Variable]) -> type[nnx.Variable]:
    """Returns a type of variables that cannot be set, for what is computed at each read."""

    def refuse(self: Any, *_: Any, **__: Any) -> None:
        raise InputError("this is an effective kernel, with its adapter: change it in the merged model")

    setters = ("set_value", "set_raw_value", "set_metadata", "copy_from", "update_from_state")
    return type(variable.__name__, (variable,), dict.fromkeys(setters, refuse))


@functools.cache
def adapted_class(original: type, names: tuple[str, ...]) -> type:
    """Returns the subclass for modules whose kernels of these names are adapted."""
    members: dict[str, Any] = {name: EffectiveKernel(name) for name in names}
    members |= {name: _with_adapters(function) for name, function in _methods(original).items()}
    members |= {f.__name__: f for f in (__setattr__, _graph_node_set_key)}
    members |= {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    keywords = {"pytree": original._pytree__is_pytree}  # pyright: ignore[reportAttributeAccessIssue]
    bases = (original, Adapted)
    return types.new_class(original.__name__, bases, keywords, lambda body: body.update(members))


def original_class(module: Any) -> Any:
    """Returns the class that a module had before it was adapted."""
    return type(module).__bases__[0] if isinstance(module, Adapted) else type(module)


def __setattr__(self: Any, name: str, value: Any) -> None:
    if any(spec.name == name for spec in vars(self)[SPECS]):
        raise InputError(f"{type(self).__name__}.{name} has an adapter: change it in the merged model")
    original_class(self).__setattr__(self, name, value)


def _graph_node_set_key(self: Any, key: Any, value: Any) -> None:
    # Transforms of NNX set attributes by this, and mean the stored kernel.
    stored = vars(self).get(key)
    if isinstance(stored, nnx.Variable) and isinstance(value, nnx.Variable):
        stored.update_from_state(value)
    else:
        original_class(self)._graph_node_set_key(self, key, value)


def modules(model: Any) -> Iterator[nnx.Pytree]:
    """Returns every module below a model, and itself."""
    return (node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Pytree))


def kernels(module: Any) -> Iterator[tuple[nnx.Variable, On, dict[str, nnx.Variable]]]:
    """Returns the stored kernels of a module that are adapted, and the variables of their adapters."""
    for spec in vars(module).get(SPECS, ()):
        arrays = {array: vars(module)[spec.attribute(array)] for array, _ in spec.shapes}
        yield vars(module)[spec.name], spec.kernel(module).on, arrays


def adopt(module: Any, adapters: Mapping[str, tuple[On, Mapping[str, nnx.Variable]]]) -> None:
    """Gives adapters to kernels that a module owns, by attribute.

    Raises:
      InputError: if the module is a container, or has attributes of the arrays' names.
    """
    name = type(module).__name__
    if isinstance(module, CONTAINERS):
        raise InputError(f"kernels in an nnx.{name} cannot be adapted: make them attributes of a module")
    specs = []
    for kernel in sorted(adapters):  # the order is part of the graph definition
        on, arrays = adapters[kernel]
        shape = vars(module)[kernel].get_raw_value().shape
        spec = Spec.of(kernel, on, shape, {array: v.get_raw_value() for array, v in arrays.items()})
        for array, variable in arrays.items():
            if hasattr(module, spec.attribute(array)):
                raise InputError(f"{name} has an attribute {spec.attribute(array)}, the adapter's name")
            setattr(module, spec.attribute(array), variable)
        specs.append(spec)
    setattr(module, SPECS, tuple(specs))
    object.__setattr__(module, "__class__", adapted_class(type(module), tuple(sorted(adapters))))


def release(module: Any) -> None:
    """Takes the adapters off a module, which gets its original class back."""
    attributes = [spec.attribute(array) for spec in vars(module)[SPECS] for array, _ in spec.shapes]
    object.__setattr__(module, "__class__", original_class(module))
    for name in (*attributes, SPECS):
        delattr(module, name)


# A method as a program.


def _methods(original: type) -> dict[str, Function]:
    """Returns the methods by which others use modules of a class, without those of every module."""
    found: dict[str, Any] = {}
    for base in original.__mro__:
        if base not in nnx.Module.__mro__:
            found = {**vars(base), **found}
    return {
        name: function
        for name, function in found.items()
        if inspect.isfunction(function) and (name == "__call__" or not name.startswith("_"))
    }


def _with_adapters(function: Function) -> Function:
    @functools.wraps(function)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            call = _Call.traced(function, self, args, kwargs)
        except UNTRACEABLE:
            call = None
        return call.result() if call else function(self, *args, **kwargs)

    return method


class _NotTraced(Exception):
    """A method does what only the module itself can do, such as returning a submodule."""


@dataclasses.dataclass
class _Call:
    """A method's call as a program: its inputs are the kernels, its outputs all that the call makes.

    Attributes:
      program: the method's arrays, and then the variables that it changed.
      kernels: the kernels with their adapters.
      leaves: what the method returned; None in the place of an array.
      structure: how the leaves are put together.
      changed: the module's variables that it changed, and how the arrays of each are put together.
    """

    program: Any
    kernels: list[Kernel]
    leaves: list[Any]
    structure: Any
    changed: list[tuple[nnx.Variable, Any]]

    @staticmethod
    def traced(function: Function, module: Any, args: Any, kwargs: Any) -> "_Call | None":
        """Traces a method on a copy of its module; None if it has to run on the module itself."""
        inputs, structure = jax.tree.flatten((args, kwargs), is_leaf=_is_node)
        nodes = {i: leaf for i, leaf in enumerate(inputs) if _is_node(leaf)}
        root, specs = (module, list(nodes.values())), vars(module)[SPECS]
        call = _Call(None, [spec.kernel(module) for spec in specs], [], None, [])

        def run(ws: list[jax.Array]) -> list[jax.Array]:
            copy, others = _copied(root, specs, ws)
            replaced = dict(zip(nodes, others, strict=True))
            own_args, own_kwargs = jax.tree.unflatten(
                structure, [replaced.get(i, leaf) for i, leaf in enumerate(inputs)]
            )
            graph, before = nnx.graphdef((copy, others)), _values((copy, others))
            returned = function(copy, *own_args, **own_kwargs)
            if nnx.graphdef((copy, others)) != graph:
                raise _NotTraced
            arrays = call._keep(returned)
            return arrays + call._changes(_variables(root), before, _values((copy, others)))

        try:
            call.program = jax.make_jaxpr(run)([k.w for k in call.kernels])
        except _NotTraced:
            return None
        return call

    def result(self) -> Any:
        """Runs the program with adapters. Returns what the method returns, and changes what it changes."""
        outputs = evaluate(self.program.jaxpr, self.program.consts, self.kernels)
        arrays = iter([materialised(output, "an output of a method") for output in outputs])
        leaves = [next(arrays) if leaf is None else leaf for leaf in self.leaves]
        for variable, structure in self.changed:
            value = jax.tree.unflatten(structure, [next(arrays) for _ in range(structure.num_leaves)])
            variable.set_raw_value(value)
        return jax.tree.unflatten(self.structure, leaves)

    def _keep(self, returned: Any) -> list[jax.Array]:
        """Returns the arrays that a method returned, and remembers the rest."""
        leaves, self.structure = jax.tree.flatten(returned, is_leaf=_is_node)
        if any(_is_node(leaf) or not isinstance(leaf, (jax.Array, *CONSTANTS)) for leaf in leaves):
            raise _NotTraced
        self.leaves = [None if isinstance(leaf, jax.Array) else leaf for leaf in leaves]
        return [leaf for leaf in leaves if isinstance(leaf, jax.Array)]

    def _changes(self, variables: Mapping[Any, nnx.Variable], before: Any, after: Any) -> list[jax.Array]:
        """Returns the arrays of the copy's variables that changed, and remembers the module's variables."""
        arrays = []
        own = {(0, kernel.name.rpartition(".")[2]) for kernel in self.kernels}
        for path, (leaves, structure) in after.items():
            old, old_structure = before[path]
            if structure != old_structure:
                raise _NotTraced
            if any(a is not b for a, b in zip(leaves, old, strict=True)):
                if path not in variables or path in own:
                    raise _NotTraced
                self.changed.append((variables[path], structure))
                arrays += leaves
        return arrays


def _copied(root: Any, specs: tuple[Spec, ...], ws: list[jax.Array]) -> Any:
    """Returns copies of a module, in its original class and with other kernels, and of further nodes."""
    copy, others = nnx.clone(root)
    object.__setattr__(copy, "__class__", original_class(copy))
    for spec, w in zip(specs, ws, strict=True):
        # A new variable: a submodule that shares the kernel has an adapter of its own to apply.
        vars(copy)[spec.name] = vars(copy)[spec.name].copy(value=w)
    return copy, others


def _is_node(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable | nnx.Pytree)


def _variables(root: Any) -> dict[Any, nnx.Variable]:
    return {path: node for path, node in nnx.iter_graph(root) if isinstance(node, nnx.Variable)}


def _values(root: Any) -> dict[Any, tuple[list[Any], Any]]:
    """Returns the leaves and the structure of all variables and arrays, by path."""
    return {
        path: jax.tree.flatten(node.get_raw_value() if isinstance(node, nnx.Variable) else node)
        for path, node in nnx.iter_graph(root)
        if isinstance(node, nnx.Variable | jax.Array | np.ndarray)
    }
