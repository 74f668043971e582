"""Next-token cross-entropy over token chunks, loss and gradient in one pass: full logits are never held.

Legend of shapes in names: T tokens, C tokens of a chunk, D model width, V vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mora_jax.errors import InputError


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy(
    x_TD: Float[Array, "T D"],
    w_DV: Float[Array, "D V"],
    targets_T: Int[Array, "T"],
    weights_T: Float[Array, "T"],
    chunk: int,
) -> Float[Array, ""]:
    """The weighted sum of -log softmax(x @ w)[target], in nats.

    Args:
      x_TD: final hidden states, in the type to compute products in; softmax and sums are float32.
      w_DV: the head.
      targets_T: the token to predict at each place.
      weights_T: the weight of each place, 0 where there is nothing to predict; it gets no gradient.
      chunk: tokens whose logits are held at a time. It must divide T.

    Raises:
      InputError: if chunk does not divide T.
    """
    w_DV = w_DV.astype(x_TD.dtype)

    def add_chunk(total: Array, inputs: Any) -> tuple[Array, None]:
        x_CD, targets_C, weights_C = inputs
        loss, _ = _chunk_loss(x_CD, w_DV, targets_C, weights_C)
        return total + loss, None

    return jax.lax.scan(add_chunk, jnp.zeros((), jnp.float32), _chunks(chunk, x_TD, targets_T, weights_T))[0]


def _forward(x_TD: Array, w_DV: Array, targets_T: Array, weights_T: Array, chunk: int) -> tuple[Array, Any]:
    w_low_DV = w_DV.astype(x_TD.dtype)

    def add_chunk(carry: tuple[Array, Array], inputs: Any) -> tuple[tuple[Array, Array], Array]:
        total, dw_DV = carry
        x_CD, targets_C, weights_C = inputs
        loss, p_CV = _chunk_loss(x_CD, w_low_DV, targets_C, weights_C)
        hit_CV = targets_C[:, None] == jnp.arange(w_DV.shape[1])[None, :]
        dlogits_CV = ((p_CV - hit_CV) * weights_C[:, None]).astype(x_CD.dtype)
        dw_DV = dw_DV + jnp.matmul(x_CD.T, dlogits_CV, preferred_element_type=jnp.float32)
        return (total + loss, dw_DV), dlogits_CV @ w_low_DV.T

    start = (jnp.zeros((), jnp.float32), jnp.zeros(w_DV.shape, jnp.float32))
    (total, dw_DV), dx_NCD = jax.lax.scan(add_chunk, start, _chunks(chunk, x_TD, targets_T, weights_T))
    return total, (dx_NCD.swapaxes(0, 1).reshape(x_TD.shape), dw_DV.astype(w_DV.dtype))


def _backward(chunk: int, gradients: Any, g: Array) -> tuple[Array, Array, None, None]:
    dx_TD, dw_DV = gradients
    return (dx_TD * g.astype(dx_TD.dtype)), dw_DV * g.astype(dw_DV.dtype), None, None


cross_entropy.defvjp(_forward, _backward)


def _chunk_loss(x_CD: Array, w_DV: Array, targets_C: Array, weights_C: Array) -> tuple[Array, Array]:
    """The chunk's weighted loss and its softmax."""
    logits_CV = jnp.matmul(x_CD, w_DV, preferred_element_type=jnp.float32)
    lse_C = jax.nn.logsumexp(logits_CV, axis=-1)
    target_C = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=-1)[:, 0]
    return jnp.sum((lse_C - target_C) * weights_C), jnp.exp(logits_CV - lse_C[:, None])


def _chunks(chunk: int, *arrays: Array) -> tuple[Array, ...]:
    tokens = arrays[0].shape[0]
    if tokens % chunk:
        raise InputError(f"the loss chunk of {chunk} tokens does not divide the {tokens} tokens of a batch")
    # Every chunk takes tokens from all over, so that each device has its share of each.
    return tuple(a.reshape(chunk, tokens // chunk, *a.shape[1:]).swapaxes(0, 1) for a in arrays)
