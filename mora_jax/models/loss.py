"""Next-token cross-entropy over chunks of tokens: loss and gradient in one pass, without full logits.

`target_scores` are the log-probabilities themselves, without a gradient.

Legend of shapes in names: T tokens, C tokens of a chunk, G shards of a batch, D model width,
V vocabulary, P vocabulary padded to full tiles of a matrix unit.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as Spec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from mora_jax import sharding
from mora_jax.errors import InputError
from mora_jax.methods.base import padded
from mora_jax.methods.linear import TILE
from mora_jax.sharding import BATCH, COLUMNS, Layout

HEAD = COLUMNS
_TOKENS = Layout((Spec(BATCH, None),))
_LOGITS = Layout((Spec(BATCH, "tensor"), Spec(BATCH, None)))
_HEAD_GRADIENTS = Layout((Spec(BATCH, None, "tensor"), Spec(BATCH, None, None)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def cross_entropy(
    x_TD: Float[Array, "T D"],
    w_DV: Float[Array, "D V"],
    targets_T: Int[Array, "T"],
    weights_T: Float[Array, "T"],
    chunk: int,
    sums: DTypeLike = jnp.float32,
    layout: Layout = HEAD,
) -> Float[Array, ""]:
    """Returns the weighted sum of -log softmax(x @ w)[target], in nats.

    Softmax and sums are float32. Logits are float32 too, except under differentiation: there they are rounded
    to x's type, which halves what is read and written.

    Args:
      x_TD: final hidden states, in the type to compute products in.
      w_DV: the head.
      targets_T: token to predict at each position.
      weights_T: weight of each position, 0 where there is nothing to predict. It gets no gradient.
      chunk: tokens whose logits are held at a time. It must divide T.
      sums: type in which devices of a mesh send each other their parts of the head's gradient.
      layout: how the head may be divided over an ambient mesh.

    Raises:
      InputError: if chunk does not divide T.
    """
    w_DP = _tiled(w_DV, x_TD, layout)

    def add_chunk(total: Array, inputs: Any) -> tuple[Array, None]:
        x_CD, targets_C, weights_C = inputs
        softmax = _softmax(x_CD, w_DP, w_DV.shape[1], targets_C, jnp.float32)
        return total + jnp.sum(softmax.loss_C * weights_C), None

    return jax.lax.scan(add_chunk, jnp.zeros((), jnp.float32), _chunks(chunk, x_TD, targets_T, weights_T))[0]


def target_scores(
    x_TD: Float[Array, "T D"],
    w_DV: Float[Array, "D V"],
    targets_T: Int[Array, "T"],
    chunk: int,
    layout: Layout = HEAD,
) -> tuple[Float[Array, "T"], Bool[Array, "T"]]:
    """Returns log softmax(x @ w)[target] in nats, in float32, and whether the target has the largest logit.

    Args:
      x_TD: final hidden states, in the type to compute products in.
      w_DV: the head.
      targets_T: token to score at each position.
      chunk: tokens whose logits are held at a time. It must divide T.
      layout: how the head may be divided over an ambient mesh.

    Raises:
      InputError: if chunk does not divide T.
    """
    w_DP = _tiled(w_DV, x_TD, layout)

    def score(_: None, inputs: Any) -> tuple[None, tuple[Array, Array]]:
        x_CD, targets_C = inputs
        logits_CP = _logits(x_CD, w_DP, w_DV.shape[1], jnp.float32)
        target_C = jnp.take_along_axis(logits_CP, targets_C[:, None], axis=-1)[:, 0]
        log_p_C = target_C - jax.nn.logsumexp(logits_CP, axis=-1)
        return None, (log_p_C, jnp.argmax(logits_CP, axis=-1) == targets_C)

    scores = jax.lax.scan(score, None, _chunks(chunk, x_TD, targets_T))[1]
    log_p_T, greedy_T = (a.swapaxes(0, 1).reshape(-1) for a in scores)
    return log_p_T, greedy_T


def _forward(
    x_TD: Array,
    w_DV: Array,
    targets_T: Array,
    weights_T: Array,
    chunk: int,
    sums: DTypeLike,
    layout: Layout,
) -> tuple[Array, Any]:
    w_DP, vocabulary = _tiled(w_DV, x_TD, layout), w_DV.shape[1]
    # Each shard sums the gradient of its own tokens; all shards are added once, after the loop.
    parts = math.gcd(sharding.batch_shards(), chunk)

    def add_chunk(carry: tuple[Array, Array], inputs: Any) -> tuple[tuple[Array, Array], Array]:
        total, dw_GDP = carry
        x_CD, targets_C, weights_C = inputs
        softmax = _softmax(x_CD, w_DP, vocabulary, targets_C, x_CD.dtype)
        # The divisor of the logits' gradient is applied to the narrow side of both products, so that the
        # logits are read once, for the sums and for what they divide.
        scale_C1 = (weights_C / softmax.sum_C)[:, None]
        unscaled_CP = _unscaled_gradient(softmax, targets_C, x_CD.dtype)
        dx_CD = jnp.matmul(unscaled_CP, w_DP.T, preferred_element_type=jnp.float32) * scale_C1
        scaled_CD = (x_CD * scale_C1).astype(x_CD.dtype)
        x_GCD, unscaled_GCP = (a.reshape(parts, -1, a.shape[-1]) for a in (scaled_CD, unscaled_CP))
        dw = jnp.einsum("gcd,gcp->gdp", x_GCD, unscaled_GCP, preferred_element_type=jnp.float32)
        total += jnp.sum(softmax.loss_C * weights_C)
        return (total, sharding.constrain(dw_GDP + dw, _HEAD_GRADIENTS)), dx_CD.astype(x_CD.dtype)

    zeros_GDP = sharding.constrain(jnp.zeros((parts, *w_DP.shape), jnp.float32), _HEAD_GRADIENTS)
    start = (jnp.zeros((), jnp.float32), zeros_GDP)
    (total, dw_GDP), dx_NCD = jax.lax.scan(add_chunk, start, _chunks(chunk, x_TD, targets_T, weights_T))
    # The padding is cut before the sum: XLA makes no reduce-scatter of a sum that is cut.
    dw_DV = sharding.scattered(sharding.summed(dw_GDP[:, :, :vocabulary], sums), layout).astype(w_DV.dtype)
    return total, (dx_NCD.swapaxes(0, 1).reshape(x_TD.shape), dw_DV)


def _backward(
    chunk: int, sums: DTypeLike, layout: Layout, gradients: Any, g: Array
) -> tuple[Array, Array, None, None]:
    dx_TD, dw_DV = gradients
    return (dx_TD * g.astype(dx_TD.dtype)), dw_DV * g.astype(dw_DV.dtype), None, None


cross_entropy.defvjp(_forward, _backward)


def _tiled(w_DV: Array, x_TD: Array, layout: Layout) -> Array:
    """Returns the head in the type of the products, its columns padded with zeros to full tiles."""
    w_DV = sharding.gathered(w_DV.astype(x_TD.dtype), layout)
    return padded(w_DV, 1, sharding.tile(w_DV.shape[1], TILE))


class Softmax(NamedTuple):
    """Statistics of a chunk's logits, in float32.

    Attributes:
      exp_CP: exp(logits - their maximum); 0 on the padding.
      sum_C: sums of exp_CP.
      target_C: entry of exp_CP at each target.
      loss_C: -log softmax at each target.
    """

    exp_CP: Array
    sum_C: Array
    target_C: Array
    loss_C: Array


def _softmax(x_CD: Array, w_DP: Array, vocabulary: int, targets_C: Array, dtype: Any) -> Softmax:
    logits_CP = _logits(x_CD, w_DP, vocabulary, dtype)
    max_C = jnp.max(logits_CP, axis=-1)
    exp_CP = jnp.exp(logits_CP - max_C[:, None])
    sum_C = jnp.sum(exp_CP, axis=-1)
    target_C = jnp.take_along_axis(logits_CP, targets_C[:, None], axis=-1)[:, 0] - max_C
    return Softmax(exp_CP, sum_C, jnp.exp(target_C), jnp.log(sum_C) - target_C)


def _logits(x_CD: Array, w_DP: Array, vocabulary: int, dtype: Any) -> Array:
    """Returns the logits in float32, computed in a type; -inf on the padding."""
    x_CD = sharding.constrain(x_CD, _TOKENS)
    logits_CP = jnp.matmul(x_CD, w_DP, preferred_element_type=dtype)
    logits_CP = sharding.constrain(logits_CP, _LOGITS).astype(jnp.float32)
    real_P = jnp.arange(w_DP.shape[1]) < vocabulary
    return jnp.where(real_P[None, :], logits_CP, -jnp.inf)


def _unscaled_gradient(softmax: Softmax, targets_C: Array, dtype: Any) -> Array:
    """Returns (softmax - one-hot targets) * sums: the exponentials, except at the targets."""
    # A small difference, hence float32; placed token by token, so that a mesh sends nothing.
    of_targets_C = (softmax.target_C - softmax.sum_C).astype(dtype)
    place = jax.vmap(lambda exp_P, target, of_target: exp_P.at[target].set(of_target, unique_indices=True))
    return place(softmax.exp_CP.astype(dtype), targets_C, of_targets_C)


def _chunks(chunk: int, *arrays: Array) -> tuple[Array, ...]:
    tokens = arrays[0].shape[0]
    if tokens % chunk:
        raise InputError(f"a loss chunk of {chunk} tokens does not divide the {tokens} tokens of a batch")
    # Every chunk is strided over the batch, so that each device holds a share of it.
    return tuple(a.reshape(chunk, tokens // chunk, *a.shape[1:]).swapaxes(0, 1) for a in arrays)
