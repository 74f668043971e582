"""`adapted`: any function of parameters, with adapters."""

import functools
import inspect
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, Literal
from jaxtyping import PRNGKeyArray

from mora_jax import trees
from mora_jax.errors import InputError, some
from mora_jax.frontends.interpreter import evaluate, materialised
from mora_jax.frontends.kernel import Kernel
from mora_jax.methods.linear import Path
from mora_jax.state import State
from mora_jax.transform import Methods, Tree, adapters_of

# What a Linen model takes holds the parameters under this name.
LINEN = "params"


def adapted(f: Callable[..., Any], methods: Methods | None = None, path: Path = "auto") -> Callable[..., Any]:
    """Returns f with adapters: equal to f at the merged parameters, without merging where that is faster.

    `f` is traced, and its program is evaluated with adapters. Products that contract the inputs of an
    adapted kernel take the paths of `dense`, also inside jit, `jax.checkpoint`, `lax.scan` and `vmap`. Every
    other use takes the effective kernel. So f may be `model.apply` of Linen or Haiku, or a plain function,
    such as a loss.

    Args:
      f: a function whose first argument is the parameters, or a dict that holds them as "params".
      methods: what is done with each parameter; None for a function of a `State`, which holds them.
      path: forces a path of `dense`.

    Returns:
      A function of f's arguments, and two more by name: `adapters`, and `dropout_key`, a random key in
      training and None elsewhere, which must be given if a method has dropout. With a `State` as first
      argument, f is called with its parameters, and `adapters` are its own. The function raises an InputError

      * if the parameters lack a kernel, or f reads no adapted kernel at all;
      * if an update would be rounded away: a kernel in bfloat16 that is not multiplied by its inputs;
      * if a `State` has other methods than the ones given here.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from mora_jax import MoRA, adapted, assign, attach
      >>> model = nn.Dense(4)
      >>> params = model.init(jax.random.key(0), jnp.ones((2, 8)))["params"]
      >>> methods = assign([("kernel", MoRA(2)), (".*", "frozen")], params)
      >>> adapters = attach(jax.random.key(1), params, methods)
      >>> adapted(model.apply, methods)({"params": params}, jnp.ones((2, 8)), adapters=adapters).shape
      (2, 4)
    """

    @functools.wraps(f)
    def apply(params: Any, *args: Any, adapters: Tree | None = None, **kwargs: Any) -> Any:
        used = methods
        if isinstance(params, State):
            if adapters is not None or (methods is not None and methods != params.methods):
                what = "adapters" if adapters is not None else "methods"
                raise InputError(f"a State has {what} of its own; adapted was given others")
            params, adapters, used = params.params, params.adapters, params.methods
        if used is None or adapters is None:
            raise InputError("give adapted its methods and the call its adapters, or call it with a State")
        dropout_key = _dropout_key(f, kwargs, used)
        prefix = "" if _holds(params, used) or not _is_linen(params) else f"{LINEN}/"
        inside = params[LINEN] if prefix else params
        kernels = _kernels(inside, adapters, used, path, dropout_key)
        if not kernels:
            return f(params, *args, **kwargs)

        def call(ws: dict[str, Any]) -> Any:
            return f(trees.replaced(params, {prefix + name: w for name, w in ws.items()}), *args, **kwargs)

        return _interpreted(call, kernels)

    return apply


def value_and_grad(f: Callable[..., Any], has_aux: bool = False) -> Callable[..., Any]:
    """Returns a function of a `State` that computes f and its gradient for the trainable arrays.

    Args:
      f: a function whose first argument is the parameters, with a scalar value, such as a loss.
      has_aux: whether f returns a pair of the scalar and something else.

    Returns:
      A function (state, *args) -> (value, gradients); the gradients have the structure of `state.trainable`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from mora_jax import LoRA, State, value_and_grad
      >>> state = State.init(jax.random.key(0), {"w": jnp.ones((4, 2))}, [("w", LoRA(1))])
      >>> loss = lambda params, x: jnp.sum(x @ params["w"])
      >>> value, gradients = value_and_grad(loss)(state, jnp.ones((3, 4)))
      >>> float(value), gradients["adapters"]["w"]["b_RD"].shape
      (24.0, (1, 2))
    """
    apply = adapted(f)

    @functools.wraps(f)
    def call(state: State, *args: Any, **kwargs: Any) -> tuple[Any, Tree]:
        if not isinstance(state, State):
            raise InputError(f"the first argument is a State, not {type(state).__name__}")

        def of_trainable(trainable: Tree) -> Any:
            return apply(state.with_trainable(trainable), *args, **kwargs)

        return jax.value_and_grad(of_trainable, has_aux=has_aux)(state.trainable)

    return call


def _interpreted(call: Callable[[dict[str, Any]], Any], kernels: dict[str, Kernel]) -> Any:
    """Returns what a function of kernels returns, its program evaluated with their adapters."""
    structure, constants = None, []

    def arrays_of(ws: list[Any]) -> list[Any]:
        nonlocal structure, constants
        leaves, structure = jax.tree.flatten(call(dict(zip(kernels, ws, strict=True))))
        constants = [None if isinstance(leaf, jax.Array) else leaf for leaf in leaves]
        return [leaf for leaf in leaves if isinstance(leaf, jax.Array)]

    program = jax.make_jaxpr(arrays_of)([kernel.w for kernel in kernels.values()])
    _check_read(program.jaxpr, list(kernels))
    outputs = evaluate(program.jaxpr, program.consts, list(kernels.values()))
    arrays = iter([materialised(output, "an output") for output in outputs])
    return jax.tree.unflatten(structure, [next(arrays) if c is None else c for c in constants])


def _dropout_key(f: Callable[..., Any], kwargs: dict[str, Any], methods: Methods) -> PRNGKeyArray | None:
    """Returns the key that a call gives, and takes it out of its arguments unless it is f's own."""
    drops = [method.name for _, method in methods.adapted() if method.dropout]
    if drops and "dropout_key" not in kwargs:
        raise InputError(f"{drops[0]} has dropout: pass dropout_key=key in training, else dropout_key=None")
    if not drops and "dropout_key" in inspect.signature(f).parameters:
        return None
    key = kwargs.pop("dropout_key", None)
    return key if drops else None


def _is_linen(params: Any) -> bool:
    return isinstance(params, Mapping) and LINEN in params


def _holds(params: Any, methods: Methods) -> bool:
    flat = trees.flatten(params)
    return all(path in flat for path, _ in methods.kernels())


def _kernels(
    params: Any, adapters: Tree, methods: Methods, path: Path, key: PRNGKeyArray | None
) -> dict[str, Kernel]:
    flat = trees.flatten(params)
    kernels = {}
    for name, on, arrays in adapters_of(params, adapters, methods):
        w = jnp.asarray(flat[name])
        own = None if key is None else jax.random.fold_in(key, zlib.crc32(name.encode()))
        groups = tuple((axis,) for axis in range(w.ndim))
        kernels[name] = Kernel(w, arrays, own, on, name, path, groups, w.dtype)
    return kernels


def _check_read(jaxpr: Jaxpr, names: Sequence[str]) -> None:
    atoms = [*jaxpr.outvars, *(atom for eqn in jaxpr.eqns for atom in eqn.invars)]
    read = {atom for atom in atoms if not isinstance(atom, Literal)}
    if read.isdisjoint(jaxpr.invars):
        raise InputError(f"the function reads none of the adapted kernels: {some([repr(n) for n in names])}")
