"""Bad steps: an update whose loss or gradient is not finite, or out of all proportion, is not made.

The judgement is part of the compiled step. It sees nothing but the loss and gradient norm of the whole batch
and arrays of the state, so that it is the same on every process and after going on from a checkpoint.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from train.config.sections import BadSteps


@struct.dataclass
class Guard:
    """What is remembered of the steps before. NaN stands where nothing was seen yet.

    Attributes:
      losses_W: losses of the last good steps, oldest first, in nats a token.
      norms_W: gradient norms of the last good steps since a restart, oldest first.
      in_a_row: bad steps since the last good one.
      skipped: bad steps of the whole run.
    """

    losses_W: Float[Array, "W"]
    norms_W: Float[Array, "W"]
    in_a_row: Int[Array, ""]
    skipped: Int[Array, ""]


def init(config: BadSteps) -> Guard:
    """What is known before the first step: nothing."""
    return Guard(_unseen(config), _unseen(config), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def judge(
    config: BadSteps, guard: Guard, loss: Float[Array, ""], norm: Float[Array, ""]
) -> tuple[Bool[Array, ""], Guard]:
    """Whether a step is bad, and what is remembered after it.

    A spike is one of perplexity or of the gradient norm, and none is seen before the window is full: the
    median is NaN until then, and nothing is above it. Once the patience is at an end every step is bad, so
    that what is left does not depend on how soon the run is stopped.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    bad = ~finite | at_an_end(config, guard)
    if config.window:
        bad |= loss > jnp.median(guard.losses_W) + math.log(config.factor)
        bad |= norm > jnp.median(guard.norms_W) * config.factor
    return bad, Guard(
        losses_W=_remember(guard.losses_W, loss, bad),
        norms_W=_remember(guard.norms_W, norm, bad),
        in_a_row=jnp.where(bad, guard.in_a_row + 1, 0),
        skipped=guard.skipped + bad,
    )


def unless(bad: Bool[Array, ""], new: Any, old: Any) -> Any:
    """The new tree, or bit for bit the old one after a bad step."""
    return jax.tree.map(lambda n, o: jnp.where(bad, o, n), new, old)


def after_restart(config: BadSteps, guard: Guard) -> Guard:
    """A restart changes what is trained, and with it the size of gradients; the loss goes on as it was."""
    return dataclasses.replace(guard, norms_W=_unseen(config))


def at_an_end(config: BadSteps, guard: Guard) -> Bool[Array, ""]:
    """Whether the patience is."""
    return guard.in_a_row >= config.patience


def try_again(config: BadSteps, guard: Guard) -> Guard:
    """A run that was stopped for bad steps and is started again has its patience back."""
    return dataclasses.replace(guard, in_a_row=jnp.where(at_an_end(config, guard), 0, guard.in_a_row))


def _unseen(config: BadSteps) -> Array:
    return jnp.full(max(config.window, 1), jnp.nan, jnp.float32)  # a checkpoint cannot hold empty arrays


def _remember(seen_W: Array, value: Array, bad: Array) -> Array:
    return jnp.where(bad, seen_W, jnp.append(seen_W, value)[1:])
