"""Fits adapters to the gradients of their kernels, for methods that ask for it, such as spectral."""

import functools
import itertools
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from mora_jax import sharding, trees
from mora_jax.errors import InputError
from mora_jax.methods.base import Method
from mora_jax.transform import Methods, Tree


def orient(adapters: Tree, methods: Methods, gradients: Tree, key: PRNGKeyArray | None = None) -> Tree:
    """Fits adapters that have no update yet to the gradients of their kernels, for methods that do so.

    A kernel, or one of a stack, keeps its adapter if its gradient or what is fitted to it is not finite.

    Args:
      adapters: as `attach` or `restart` returned them.
      methods: what the arrays mean.
      gradients: nested dict of the gradients of the kernels of `methods.orientable()`, at their paths.
      key: random key of what methods draw.

    Raises:
      InputError: if a gradient is missing or has another shape than its kernel, or a method needs a key.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from mora_jax import Spectral, assign, attach, orient
      >>> params = {"kernel": jnp.ones((8, 4))}
      >>> methods = assign([(".*", Spectral(1))], params)
      >>> adapters = attach(jax.random.key(0), params, methods)
      >>> gradient = jax.random.normal(jax.random.key(1), (8, 4))
      >>> arrays = orient(adapters, methods, {"kernel": gradient})["kernel"]
      >>> u, s, v = jnp.linalg.svd(gradient)
      >>> bool(jnp.abs(jnp.vdot(arrays["u_KR"][:, 0], u[:, 0])) > 0.99)
      True
    """
    found, flat = trees.flatten(gradients), trees.flatten(adapters)
    alike: dict[tuple[Method, tuple[int, ...]], list[tuple[str, Any]]] = defaultdict(list)
    for path, on in methods.orientable():
        if path not in found:
            raise InputError(f"there is no gradient of {path}")
        arrays = {name: flat[f"{path}/{name}"] for name in on.method.leaves()}
        axes = on.axes(found[path].shape)
        gradient, stack = axes.matrices(found[path]), axes.sizes(axes.stack)
        shapes = on.method.shapes(axes.k, axes.d)
        if any(array.shape != stack + shapes[name] for name, array in arrays.items()):
            raise InputError(f"{path}: a gradient of {gradient.shape} is not of the kernel that is adapted")
        alike[on.method, gradient.shape[-2:]].append((path, _one_stack(arrays, gradient)))
    # Kernels of one shape together. XLA compiles one decomposition for all, which takes a minute for a TPU,
    # and devices have more to share.
    for group, ((method, _), kernels) in enumerate(alike.items()):
        stacks = jax.tree.map(lambda *parts: jnp.concatenate(parts), *(stack for _, stack in kernels))
        ends = list(itertools.accumulate(len(gradient) for _, (_, gradient) in kernels))
        seeds = None if key is None else _seeds(jax.random.fold_in(key, group), ends[-1])
        fitted = sharding.one_by_one(functools.partial(_fitted, method), *stacks, seeds)
        for name, array in fitted.items():
            for (path, _), part in zip(kernels, jnp.split(array, ends[:-1]), strict=True):
                flat[f"{path}/{name}"] = part.reshape(flat[f"{path}/{name}"].shape)
    return trees.unflatten(flat)


def _one_stack(arrays: dict[str, Array], gradient: Array) -> tuple[dict[str, Array], Array]:
    """Returns a kernel's arrays and gradient with one axis in place of those of its stack."""
    depth = gradient.ndim - 2
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[depth:]), (arrays, gradient))


def _seeds(key: PRNGKeyArray, count: int) -> Array:
    """Returns seeds of keys, one for each kernel: shards of a mesh take arrays of numbers."""
    return jax.random.bits(key, (count,))


def _fitted(
    method: Method, arrays: dict[str, Array], gradient: Array, seed: Array | None
) -> dict[str, Array]:
    fitted = method.oriented(arrays, gradient, None if seed is None else jax.random.key(seed))
    usable = jnp.isfinite(gradient).all()
    for array in fitted.values():
        usable &= jnp.isfinite(array).all()
    return {name: jnp.where(usable, array, arrays[name]) for name, array in fitted.items()}
