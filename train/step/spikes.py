"""Bad steps: an update whose loss or gradient is not finite, or far above what is normal, is skipped.

The judgement is part of the compiled step. It depends only on the loss and gradient norm of the full batch
and on arrays of the state, so it is equal on every process and after resuming from a checkpoint.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from mora_jax.sharding import REPLICATED, Rules
from train.config.sections import BadSteps

LAYOUTS: Rules = (("spikes/[a-z_]*W", REPLICATED),)


@struct.dataclass
class History:
    """What is remembered of earlier steps. NaN stands for steps that have not happened yet.

    Attributes:
      losses_W: losses of the last good steps, oldest first, in nats a token.
      norms_W: gradient norms of the last good steps since a restart, oldest first.
      in_a_row: bad steps since the last good one.
      skipped: bad steps of the run so far.
    """

    losses_W: Float[Array, "W"]
    norms_W: Float[Array, "W"]
    in_a_row: Int[Array, ""]
    skipped: Int[Array, ""]


def init(config: BadSteps) -> History:
    """Returns the history before the first step."""
    return History(_unseen(config), _unseen(config), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def judge(
    config: BadSteps, history: History, loss: Float[Array, ""], norm: Float[Array, ""]
) -> tuple[Bool[Array, ""], History]:
    """Returns whether a step is bad, and the history after it.

    A spike is one of perplexity or of the gradient norm. None is detected before the window is full: its
    median is NaN until then, and nothing is above NaN. A gradient that stays high after half of the patience,
    at an ordinary loss, is no spike of a batch but a new level, such as that at the end of a plateau: the
    step is good, and earlier norms are forgotten. Once the patience is exhausted every step is bad, so that
    the final state does not depend on how soon the run stops.
    """
    norms_W = history.norms_W
    bad = ~(jnp.isfinite(loss) & jnp.isfinite(norm)) | exhausted(config, history)
    if config.window:
        bad |= loss > jnp.median(history.losses_W) + math.log(config.factor)
        steep = norm > jnp.median(norms_W) * config.factor
        level = steep & ~bad & (history.in_a_row >= max(1, config.patience // 2))
        norms_W = jnp.where(level, _unseen(config), norms_W)
        bad |= steep & ~level
    return bad, History(
        losses_W=_remember(history.losses_W, loss, bad),
        norms_W=_remember(norms_W, norm, bad),
        in_a_row=jnp.where(bad, history.in_a_row + 1, 0),
        skipped=history.skipped + bad,
    )


def unless(bad: Bool[Array, ""], new: Any, old: Any) -> Any:
    """Returns the new tree, or bit for bit the old one after a bad step."""
    return jax.tree.map(lambda n, o: jnp.where(bad, o, n), new, old)


def after_restart(config: BadSteps, history: History) -> History:
    """Returns the history after a restart: gradient norms are forgotten, since other arrays are trained."""
    return dataclasses.replace(history, norms_W=_unseen(config))


def exhausted(config: BadSteps, history: History) -> Bool[Array, ""]:
    """Returns whether as many bad steps in a row were seen as the patience allows."""
    return history.in_a_row >= config.patience


def with_patience(config: BadSteps, history: History) -> History:
    """Returns the history with its patience restored, for a run that stopped for bad steps and is resumed."""
    return dataclasses.replace(history, in_a_row=jnp.where(exhausted(config, history), 0, history.in_a_row))


def _unseen(config: BadSteps) -> Array:
    return jnp.full(max(config.window, 1), jnp.nan, jnp.float32)  # a checkpoint cannot hold empty arrays


def _remember(seen_W: Array, value: Array, bad: Array) -> Array:
    return jnp.where(bad, seen_W, jnp.append(seen_W, value)[1:])
