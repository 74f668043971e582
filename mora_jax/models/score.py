"""Log-likelihoods of given tokens, for rows of different lengths, without the logits of whole rows.

Rows are sorted by length and padded to few shapes, so that few programs are compiled.

Legend of shapes in names: B rows, T tokens of a row, Q targets of a row.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mora_jax import sharding
from mora_jax.models.batch import Batch
from mora_jax.models.llama import Llama, largest_divisor
from mora_jax.models.loss import target_scores

LEAST_LENGTH = 16


class Row(NamedTuple):
    """What a model reads, and what is asked of it.

    Attributes:
      tokens: what it reads, at most its context.
      at: positions of the row after which a token is scored.
      targets: the token at each of them.
    """

    tokens: Int[np.ndarray, "T"]
    at: Int[np.ndarray, "Q"]
    targets: Int[np.ndarray, "Q"]


class Scores(NamedTuple):
    """The scores of the targets of a row.

    Attributes:
      log_p_Q: their log-probabilities in nats.
      greedy_Q: whether each is the most probable token.
    """

    log_p_Q: Float[np.ndarray, "Q"]
    greedy_Q: Bool[np.ndarray, "Q"]


@functools.partial(jax.jit, static_argnames="model")
def score_batch(
    model: Llama,
    params: Any,
    tokens_BT: Int[Array, "B T"],
    at_BQ: Int[Array, "B Q"],
    targets_BQ: Int[Array, "B Q"],
) -> tuple[Float[Array, "B Q"], Bool[Array, "B Q"]]:
    """Returns the log-probability of each target, and whether it is the most probable token.

    Only the hidden states at the asked positions meet the head, `Compute.loss_chunk` of a device at a time.

    Args:
      model: the model.
      params: its parameters, which `bind` may have joined to adapters.
      tokens_BT: the rows, padded behind their tokens.
      at_BQ: positions after which tokens are scored.
      targets_BQ: the tokens.
    """

    def asked(llama: Llama) -> tuple[Array, Array]:
        x_BTD = llama.hidden(Batch(tokens_BT))
        return jnp.take_along_axis(x_BTD, at_BQ[..., None], axis=1), llama.head()

    hidden: Any = model.apply({"params": params}, method=asked)
    x_BQD, w_DV = hidden
    x_ND = x_BQD.reshape(-1, x_BQD.shape[-1])
    shards = math.gcd(sharding.batch_shards(), len(x_ND))
    chunk = shards * largest_divisor(len(x_ND) // shards, model.compute.loss_chunk)
    targets_N, layout = targets_BQ.reshape(-1), model.head_layout()
    log_p_N, greedy_N = target_scores(x_ND, w_DV, targets_N, chunk, layout)
    return log_p_N.reshape(at_BQ.shape), greedy_N.reshape(at_BQ.shape)


def score(
    model: Llama,
    params: Any,
    rows: Sequence[Row],
    batch_size: int,
    done: Callable[[int], None] = lambda count: None,
) -> list[Scores]:
    """Returns the scores of each row, some rows at a time, longest first.

    On an ambient mesh (`jax.set_mesh`) rows are divided along `data` and `fsdp`.

    Args:
      model: the model.
      params: its parameters; `bind` joins them to adapters that are not merged.
      rows: what to score.
      batch_size: rows that are computed at a time.
      done: called with the number of rows of each batch when it is computed.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> from mora_jax.models.llama import Llama, LlamaConfig
      >>> from mora_jax.models.score import Row, score
      >>> model = Llama(LlamaConfig(50, 16, 16, 1, 2, 2))
      >>> params = model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
      >>> row = Row(np.array([1, 2, 3]), np.array([1, 2]), np.array([3, 4]))  # p(3 | 1, 2) and p(4 | 1, 2, 3)
      >>> [found.log_p_Q.shape for found in score(model, params, [row], batch_size=1)]
      [(2,)]
    """
    shards, context = sharding.batch_shards(), model.config.max_position_embeddings
    size = shards * _power_of_two(-(-min(batch_size, len(rows)) // shards))
    shapes = [(min(_length(len(row.tokens)), context), _power_of_two(len(row.at))) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: shapes[i], reverse=True)
    found: dict[int, Scores] = {}
    for numbers, scores in _behind(_started(model, params, rows, order, size, shapes)):
        log_p_BQ, greedy_BQ = jax.device_get(scores)
        for i, log_p_Q, greedy_Q in zip(numbers, log_p_BQ, greedy_BQ, strict=False):
            count = len(rows[i].at)
            found[i] = Scores(log_p_Q[:count], greedy_Q[:count])
        done(len(numbers))
    return [found[i] for i in range(len(rows))]


Started = tuple[list[int], tuple[Array, Array]]


def _started(
    model: Llama,
    params: Any,
    rows: Sequence[Row],
    order: list[int],
    size: int,
    shapes: Sequence[tuple[int, int]],
) -> Iterator[Started]:
    """Yields the numbers of the rows of each batch, and their scores, which the device still computes."""
    for start in range(0, len(order), size):
        numbers = order[start : start + size]
        length, targets = (max(sizes) for sizes in zip(*(shapes[i] for i in numbers), strict=True))
        tokens_BT = np.zeros((size, length), np.int32)
        at_BQ, targets_BQ = np.zeros((2, size, targets), np.int32)
        for b, i in enumerate(numbers):
            row = rows[i]
            tokens_BT[b, : len(row.tokens)] = row.tokens
            at_BQ[b, : len(row.at)], targets_BQ[b, : len(row.at)] = row.at, row.targets
        yield numbers, score_batch(model, params, tokens_BT, at_BQ, targets_BQ)


def _behind(batches: Iterator[Started]) -> Iterator[Started]:
    """Yields each batch when the next one is started, so that the device never waits."""
    last = None
    for batch in batches:
        if last:
            yield last
        last = batch
    if last:
        yield last


def _length(least: int) -> int:
    """Returns the next power of two, or three quarters of it if they suffice."""
    power = _power_of_two(max(least, LEAST_LENGTH))
    return power * 3 // 4 if least <= power * 3 // 4 and power > LEAST_LENGTH else power


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
