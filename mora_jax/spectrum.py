"""Singular values of updates: the rank that a method used."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mora_jax import trees
from mora_jax.transform import Methods, Params


def singular_values(
    before: Params, after: Params, methods: Methods | None = None
) -> dict[str, Float[Array, "*L R"]]:
    """Returns the singular values, largest first, of the update of every kernel that changed.

    Args:
      before: parameters, such as those at the start of a run.
      after: the same tree later, with the adapters merged (`mora_jax.merge`).
      methods: which axes of an adapted kernel are inputs, outputs and stack. Other parameters count as
        kernels (in, out) if they have two axes.

    Returns:
      path -> (*stack, min(k, d)).

    Example:
      >>> import jax.numpy as jnp
      >>> from mora_jax import LoRA, assign, singular_values
      >>> before = {"w": jnp.zeros((3, 2))}
      >>> singular_values(before, {"w": before["w"].at[0, 0].set(4.0)}, assign([("w", LoRA(1))], before))["w"]
      Array([4., 0.], dtype=float32)
    """
    now, kernels = trees.flatten(after), dict(methods.kernels() if methods else ())
    found = {}
    for path, w in trees.flatten(before).items():
        if path in kernels or w.ndim == 2:
            dw = kernels[path].axes(w.shape).matrices(now[path] - w) if path in kernels else now[path] - w
            if jnp.any(dw != 0):
                found[path] = jnp.linalg.svd(dw, compute_uv=False)
    return found


def numerical_rank(values: Float[Array, "*L R"], relative: float = 1e-4) -> Int[Array, "*L"]:
    """Returns the number of singular values above `relative` times the largest; 1e-4 suits float32."""
    return jnp.sum(values > relative * jnp.max(values, axis=-1, keepdims=True), axis=-1)
