"""Next-token cross-entropy over token chunks, loss and gradient in one pass: full logits are never held.

Legend of shapes in names: T tokens, C tokens of a chunk, G parts that a mesh makes of a batch, D model
width, V vocabulary, P vocabulary padded to whole tiles of a matrix unit.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mora_jax import sharding
from mora_jax.errors import InputError
from mora_jax.methods.base import padded
from mora_jax.methods.linear import TILE

HEAD = "lm_head/kernel"


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
      x_TD: final hidden states, in the type to compute products in; softmax and sums are float32. Logits are
        as well, but where gradients are asked for: then they are rounded to x's type, of which there is half
        as much to read and write.
      w_DV: the head.
      targets_T: the token to predict at each place.
      weights_T: the weight of each place, 0 where there is nothing to predict; it gets no gradient.
      chunk: tokens whose logits are held at a time. It must divide T.

    Raises:
      InputError: if chunk does not divide T.
    """
    w_DP = _tiled(w_DV, x_TD)

    def add_chunk(total: Array, inputs: Any) -> tuple[Array, None]:
        x_CD, targets_C, weights_C = inputs
        softmax = _softmax(x_CD, w_DP, w_DV.shape[1], targets_C, jnp.float32)
        return total + jnp.sum(softmax.loss_C * weights_C), None

    return jax.lax.scan(add_chunk, jnp.zeros((), jnp.float32), _chunks(chunk, x_TD, targets_T, weights_T))[0]


def _forward(x_TD: Array, w_DV: Array, targets_T: Array, weights_T: Array, chunk: int) -> tuple[Array, Any]:
    w_DP, vocabulary = _tiled(w_DV, x_TD), w_DV.shape[1]
    # Each part of a mesh sums the gradient of its own tokens; all are added once, behind the loop.
    parts = math.gcd(sharding.batch_shards(), chunk)

    def add_chunk(carry: tuple[Array, Array], inputs: Any) -> tuple[tuple[Array, Array], Array]:
        total, dw_GDP = carry
        x_CD, targets_C, weights_C = inputs
        softmax = _softmax(x_CD, w_DP, vocabulary, targets_C, x_CD.dtype)
        # What the gradient of the logits is to be divided by goes to the narrow side of both products: so one
        # reading of the logits gives the sums and all that they divide.
        scale_C1 = (weights_C / softmax.sum_C)[:, None]
        unscaled_CP = _unscaled_gradient(softmax, targets_C, x_CD.dtype)
        dx_CD = jnp.matmul(unscaled_CP, w_DP.T, preferred_element_type=jnp.float32) * scale_C1
        scaled_CD = (x_CD * scale_C1).astype(x_CD.dtype)
        x_GCD, unscaled_GCP = (a.reshape(parts, -1, a.shape[-1]) for a in (scaled_CD, unscaled_CP))
        dw = jnp.einsum("gcd,gcp->gdp", x_GCD, unscaled_GCP, preferred_element_type=jnp.float32)
        total += jnp.sum(softmax.loss_C * weights_C)
        return (total, _divided(dw_GDP + dw)), dx_CD.astype(x_CD.dtype)

    start = (jnp.zeros((), jnp.float32), _divided(jnp.zeros((parts, *w_DP.shape), jnp.float32)))
    (total, dw_GDP), dx_NCD = jax.lax.scan(add_chunk, start, _chunks(chunk, x_TD, targets_T, weights_T))
    dw_DV = sharding.scattered(dw_GDP.sum(axis=0)[:, :vocabulary].astype(w_DV.dtype), HEAD)
    return total, (dx_NCD.swapaxes(0, 1).reshape(x_TD.shape), dw_DV)


def _divided(dw_GDP: Array) -> Array:
    return sharding.constrain(dw_GDP, "activations/head_gradients")


def _backward(chunk: int, gradients: Any, g: Array) -> tuple[Array, Array, None, None]:
    dx_TD, dw_DV = gradients
    return (dx_TD * g.astype(dx_TD.dtype)), dw_DV * g.astype(dw_DV.dtype), None, None


cross_entropy.defvjp(_forward, _backward)


def _tiled(w_DV: Array, x_TD: Array) -> Array:
    """The head in the type of the products, with columns of zeros up to whole tiles."""
    w_DV = sharding.gathered(w_DV.astype(x_TD.dtype), HEAD)
    return padded(w_DV, 1, sharding.tile(w_DV.shape[1], TILE))


class Softmax(NamedTuple):
    """Of a chunk's logits, in float32: exp(logits - their maximum), 0 on the padding, the sums of these, the
    one of each target, and -log softmax of it."""

    exp_CP: Array
    sum_C: Array
    target_C: Array
    loss_C: Array


def _softmax(x_CD: Array, w_DP: Array, vocabulary: int, targets_C: Array, dtype: Any) -> Softmax:
    x_CD = sharding.constrain(x_CD, "activations/tokens")
    logits_CP = jnp.matmul(x_CD, w_DP, preferred_element_type=dtype)
    logits_CP = sharding.constrain(logits_CP, "activations/logits").astype(jnp.float32)
    real_P = jnp.arange(w_DP.shape[1]) < vocabulary
    logits_CP = jnp.where(real_P[None, :], logits_CP, -jnp.inf)
    max_C = jnp.max(logits_CP, axis=-1)
    exp_CP = jnp.exp(logits_CP - max_C[:, None])
    sum_C = jnp.sum(exp_CP, axis=-1)
    target_C = jnp.take_along_axis(logits_CP, targets_C[:, None], axis=-1)[:, 0] - max_C
    return Softmax(exp_CP, sum_C, jnp.exp(target_C), jnp.log(sum_C) - target_C)


def _unscaled_gradient(softmax: Softmax, targets_C: Array, dtype: Any) -> Array:
    """(softmax - one-hot targets) * sums, which is the exponentials but for the places of the targets."""
    # A difference in float32, for it may be small; token by token, so that a mesh sends nothing.
    of_targets_C = (softmax.target_C - softmax.sum_C).astype(dtype)
    place = jax.vmap(lambda exp_P, target, of_target: exp_P.at[target].set(of_target, unique_indices=True))
    return place(softmax.exp_CP.astype(dtype), targets_C, of_targets_C)


def _chunks(chunk: int, *arrays: Array) -> tuple[Array, ...]:
    tokens = arrays[0].shape[0]
    if tokens % chunk:
        raise InputError(f"the loss chunk of {chunk} tokens does not divide the {tokens} tokens of a batch")
    # Every chunk takes tokens from all over, so that each device has its share of each.
    return tuple(a.reshape(chunk, tokens // chunk, *a.shape[1:]).swapaxes(0, 1) for a in arrays)
