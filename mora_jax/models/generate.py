"""Generation: prompts of different lengths continued together, token by token, greedy or sampled.

Prompts are padded on the left, so that all rows end in one slot of the cache. A row computes what it would
alone: its positions count from its first token, its padding is never seen, its random numbers are its own.

Legend of shapes in names: B rows, T slots of the prompts, N new tokens, V vocabulary, E tokens that end rows.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from mora_jax import sharding
from mora_jax.errors import InputError, check_float32
from mora_jax.models.cache import Cache
from mora_jax.models.config import LlamaConfig
from mora_jax.models.llama import Llama
from mora_jax.sharding import BATCH, Layout

# Tokens of each prompt that are computed at a time: their scores over all slots are held in float32.
CHUNK = 256
LEAST_SLOTS = 16
NONE = -1  # in the place of a token that a row has no more

_ROWS = Layout((P(BATCH),))

Ended = Callable[[int, list[int]], int | None]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when a row ends.

    Attributes:
      max_new_tokens: most new tokens of a row. A row also ends where the model's context does.
      temperature: what logits are divided by; 0 takes the most probable token.
      top_p: tokens are drawn from the fewest whose probabilities sum to this; 1 for all.
      seed: of the random numbers. Those of a row depend on the seed and on its number, not on other rows.
      eos_ids: tokens that end a row.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.max_new_tokens < 2**31:
            raise InputError(f"max_new_tokens must lie in [1, 2**31), not {self.max_new_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature must be finite and at least 0, not {self.temperature}")
        check_float32("temperature", self.temperature)
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must lie in (0, 1], not {self.top_p}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed must lie in [0, 2**63), not {self.seed}")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature", "top_p", "keys_B", "limits_B", "eos_E"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class How:
    """`Sampling` as arrays, so that no value of it compiles anew; `limits_B` counts new tokens."""

    temperature: Float[Array, ""]
    top_p: Float[Array, ""]
    keys_B: PRNGKeyArray
    limits_B: Int[Array, "B"]
    eos_E: Int[Array, "E"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["cache", "tokens_BN", "count", "ended_B"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows that are being generated.

    Attributes:
      cache: keys and values of all tokens but the newest.
      tokens_BN: new tokens; NONE behind the last one of a row.
      count: new tokens so far, of rows that have not ended.
      ended_B: which rows have ended.
    """

    cache: Cache
    tokens_BN: Int[Array, "B N"]
    count: Int[Array, ""]
    ended_B: Bool[Array, "B"]


@functools.partial(jax.jit, static_argnames=("model", "slots"))
def prefill(
    model: Llama, params: Any, how: How, tokens_BT: Int[Array, "B T"], starts_B: Int[Array, "B"], slots: int
) -> Rows:
    """Reads the prompts and chooses the first new token of each row.

    Args:
      model: the model.
      params: its parameters, which `bind` may have joined to adapters.
      how: how tokens are chosen.
      tokens_BT: the prompts, each at the end of its row; T is a power of two.
      starts_B: where they begin.
      slots: of the cache: those of the prompts and of the new tokens.
    """
    rows, length = tokens_BT.shape
    parts = tokens_BT.reshape(rows, -1, min(CHUNK, length)).swapaxes(0, 1)

    def read(cache: Any, tokens_BT: Array) -> tuple[Any, Array]:
        logits_BV, cache = model.apply({"params": params}, tokens_BT, cache, method=Llama.extend)
        return cache, logits_BV

    cache = Cache.empty(model.config, model.compute.dtype, starts_B, slots)
    cache, logits = jax.lax.scan(read, cache, parts)
    none_BN = jnp.full((rows, slots - length), NONE, jnp.int32)
    started = Rows(cache, none_BN, jnp.zeros((), jnp.int32), how.limits_B < 1)
    return _with_next(started, how, logits[-1])


@functools.partial(jax.jit, static_argnames="model", donate_argnames="rows")
def decode(
    model: Llama, params: Any, how: How, rows: Rows, ended_B: Bool[Array, "B"], steps: Int[Array, ""]
) -> Rows:
    """Generates so many more tokens of each row, fewer if all rows end. The rows are donated.

    Args:
      model: the model.
      params: its parameters, as in `prefill`.
      how: how tokens are chosen.
      rows: what `prefill` or `decode` returned.
      ended_B: rows that the caller ends.
      steps: new tokens.
    """
    last = rows.count + steps

    def unfinished(rows: Rows) -> Array:
        return (rows.count < last) & ~jnp.all(rows.ended_B)

    def step(rows: Rows) -> Rows:
        newest_B1 = jax.lax.dynamic_slice_in_dim(rows.tokens_BN, rows.count - 1, 1, axis=1)
        fed_B1 = jnp.maximum(newest_B1, 0)  # rows that have ended are computed, and not looked at
        logits_BV, cache = model.apply({"params": params}, fed_B1, rows.cache, method=Llama.extend)
        return _with_next(dataclasses.replace(rows, cache=cache), how, logits_BV)

    rows = dataclasses.replace(rows, ended_B=rows.ended_B | ended_B)
    return jax.lax.while_loop(unfinished, step, rows)


def generate(
    model: Llama,
    params: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling = Sampling(),
    numbers: Sequence[int] | None = None,
    ended: Ended = lambda row, tokens: None,
    every: int = 16,
) -> list[list[int]]:
    """Returns the new tokens of each prompt, all of which are computed together.

    Shapes are powers of two, so that few are compiled. On an ambient mesh (`jax.set_mesh`) rows are divided
    along `data` and `fsdp`, keys and values along `tensor`.

    Args:
      model: the model.
      params: its parameters; `bind` joins them to adapters that are not merged.
      prompts: tokens of each prompt, at least one.
      sampling: how tokens are chosen, and when a row ends.
      numbers: the number of each row, for its random numbers; 0, 1, ... by default.
      ended: called with a row and its new tokens so far, after every few of them: how many to keep of them,
        which ends the row, or None.
      every: new tokens between two of these calls.

    Raises:
      InputError: if a prompt is empty, fills the model's context, or has a token that the model lacks.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from mora_jax.models.generate import Sampling, generate
      >>> from mora_jax.models.llama import Llama, LlamaConfig
      >>> model = Llama(LlamaConfig(50, 16, 16, 1, 2, 2))
      >>> params = model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
      >>> [len(new) for new in generate(model, params, [[1, 2, 3], [4]], Sampling(max_new_tokens=5))]
      [5, 5]
    """
    check_prompts(model.config, prompts)
    tokens_BT, starts_B = _padded(prompts)
    how = _as_arrays(model.config, prompts, sampling, numbers, len(starts_B))
    slots = _power_of_two(tokens_BT.shape[1] + int(how.limits_B.max()))
    rows = prefill(model, params, how, tokens_BT, starts_B, slots)
    found: list[list[int]] = [[] for _ in prompts]
    closed_B = np.zeros(len(starts_B), bool)
    while True:
        new_BN, ended_B = jax.device_get((rows.tokens_BN, rows.ended_B))
        for i in np.flatnonzero(~closed_B[: len(prompts)]):
            found[i] = new_BN[i][new_BN[i] != NONE].tolist()
            kept = ended(int(i), found[i])
            found[i] = found[i][:kept]
            closed_B[i] = ended_B[i] or kept is not None
        if closed_B[: len(prompts)].all():
            return found
        rows = decode(model, params, how, rows, closed_B, every)


def check_prompts(config: LlamaConfig, prompts: Sequence[Sequence[int]]) -> None:
    """Raises InputError if there is no prompt, or one that a model cannot continue, counted from 1."""
    if not prompts:
        raise InputError("there is no prompt")
    context = config.max_position_embeddings
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise InputError(f"prompt {number} has no token")
        if len(prompt) >= context:
            raise InputError(
                f"prompt {number} has {len(prompt):,} tokens, which leaves no room in the model's context of "
                f"{context:,} (max_position_embeddings)"
            )
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise InputError(
                f"prompt {number} has token {max(prompt)}, and the model a vocabulary of "
                f"{config.vocab_size:,}: the tokenizer is another model's"
            )


def _with_next(rows: Rows, how: How, logits_BV: Array) -> Rows:
    """Returns rows with one more token, chosen from logits."""
    token_B = jnp.where(rows.ended_B, NONE, _chosen(how, rows.count, logits_BV))
    tokens_BN = jax.lax.dynamic_update_slice_in_dim(rows.tokens_BN, token_B[:, None], rows.count, axis=1)
    ended_B = rows.ended_B | jnp.any(token_B[:, None] == how.eos_E[None, :], axis=1)
    ended_B |= rows.count + 1 >= how.limits_B
    tokens_BN, ended_B = (sharding.constrain(x, _ROWS) for x in (tokens_BN, ended_B))
    return Rows(rows.cache, tokens_BN, rows.count + 1, ended_B)


def _chosen(how: How, count: Array, logits_BV: Array) -> Int[Array, "B"]:
    """Returns the most probable token of each row, or one that is drawn."""

    def draw(logits_BV: Array) -> Array:
        logits_BV = logits_BV / how.temperature
        logits_BV = jax.lax.cond(how.top_p < 1, _nucleus, lambda x, _: x, logits_BV, how.top_p)
        keys_B = jax.vmap(jax.random.fold_in, (0, None))(how.keys_B, count)
        return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)

    def most_probable(logits_BV: Array) -> Array:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    return jax.lax.cond(how.temperature > 0, draw, most_probable, logits_BV)


def _nucleus(logits_BV: Array, top_p: Array) -> Array:
    """Returns logits, those outside of the fewest tokens whose probabilities sum to top_p at -inf."""
    sorted_BV = -jnp.sort(-logits_BV, axis=-1)
    p_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
    least_B1 = jnp.min(jnp.where(before_BV < top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)


def _padded(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the prompts at the end of rows of a power of two, and where they begin.

    There are as many rows as the devices that share a batch, times a power of two.
    """
    shards = sharding.batch_shards()
    length = _power_of_two(max(LEAST_SLOTS, *map(len, prompts)))
    rows = shards * _power_of_two(-(-len(prompts) // shards))
    tokens_BT, starts_B = np.zeros((rows, length), np.int32), np.full(rows, length - 1, np.int32)
    for i, prompt in enumerate(prompts):
        starts_B[i] = length - len(prompt)
        tokens_BT[i, starts_B[i] :] = prompt
    return tokens_BT, starts_B


def _as_arrays(
    config: LlamaConfig,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    numbers: Sequence[int] | None,
    rows: int,
) -> How:
    limits_B, numbers_B = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
    for i, prompt in enumerate(prompts):
        limits_B[i] = min(sampling.max_new_tokens, config.max_position_embeddings - len(prompt))
        numbers_B[i] = i if numbers is None else numbers[i]
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(sampling.seed), numbers_B)
    eos_E = np.array(sampling.eos_ids or [NONE], np.int32)
    temperature, top_p = jnp.float32(sampling.temperature), jnp.float32(sampling.top_p)
    return How(temperature, top_p, keys_B, jnp.asarray(limits_B), jnp.asarray(eos_E))


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
