"""Singular values of updates: the rank that a method used."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mora_jax import trees
from mora_jax.transform import Tree


def singular_values(before: Tree, after: Tree) -> dict[str, Float[Array, "*L R"]]:
    """Returns the singular values, largest first, of the update of every kernel (..., k, d) that changed.

    Args:
      before: parameters, such as those at the start of a run.
      after: the same tree later, with the adapters merged (`mora_jax.merge`).

    Returns:
      path -> (..., min(k, d)), for each of the stacked layers.
    """
    now = trees.flatten(after)
    changes = {path: now[path] - w for path, w in trees.flatten(before).items() if w.ndim > 1}
    return {
        path: jnp.linalg.svd(dw, compute_uv=False) for path, dw in changes.items() if bool(jnp.any(dw != 0))
    }


def numerical_rank(values: Float[Array, "*L R"], relative: float = 1e-4) -> Int[Array, "*L"]:
    """Returns the number of singular values above `relative` times the largest; 1e-4 suits float32."""
    return jnp.sum(values > relative * jnp.max(values, axis=-1, keepdims=True), axis=-1)
