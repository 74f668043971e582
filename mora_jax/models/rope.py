"""Rotary positions: the angles of LLaMA, and their scalings for sequences beyond the context of pretraining.

Legend of shapes in names: T sequence, J pairs of a head's entries.
"""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mora_jax.errors import InputError, check_float32

# The fields that each type takes, beside `type`.
_CONTEXT = "original_max_position_embeddings"
FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _CONTEXT),
    "yarn": (
        "factor",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
        _CONTEXT,
    ),
}


@dataclasses.dataclass(frozen=True)
class Rope:
    """How the frequencies of rotary positions are scaled; the fields of Hugging Face's `rope_parameters`.

    Attributes:
      type: "default" scales nothing. "linear" divides all frequencies by factor. "dynamic" raises the base
        for sequences longer than max_position_embeddings. "llama3" divides the low frequencies by factor.
        "yarn" does so by a ramp over the pairs, and scales the products of queries and keys.
      factor: by how much the context is extended, at least 1; of every type but "default".
      original_max_position_embeddings: tokens of the context before it was extended; of "llama3" and "yarn".
      low_freq_factor: wavelengths above the original context over this are divided by factor; of "llama3".
      high_freq_factor: wavelengths below the original context over this are kept; of "llama3".
      beta_fast: pairs that turn at least so often in the original context are kept; of "yarn".
      beta_slow: pairs that turn at most so often are divided by factor; of "yarn".
      attention_factor: multiple of cos and sin; 0 to derive it from factor; of "yarn".
      mscale: with mscale_all_dim, the weight of log(factor) in attention_factor; 0 for none; of "yarn".
      mscale_all_dim: the same weight in its divisor; 0 for none; of "yarn".
      truncate: whether the ramp begins and ends at whole pairs; of "yarn".
    """

    type: Literal["default", "linear", "dynamic", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.type not in FIELDS:
            raise InputError(f"model.rope.type is one of {', '.join(FIELDS)}, not {self.type!r}")
        for field in dataclasses.fields(self):
            name, value = f"model.rope.{field.name}", getattr(self, field.name)
            if field.name == "type":
                continue
            if field.name not in FIELDS[self.type] and value != field.default:
                raise InputError(f"{name} has no effect with model.rope.type {self.type}")
            least = 1 if field.name in ("factor", _CONTEXT) else 0
            if not least <= value < 2**31:
                raise InputError(f"{name} must lie in [{least}, 2**31), not {value}")
            check_float32(name, value)
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if not 0 < getattr(self, low) < getattr(self, high):
                raise InputError(
                    f"model.rope.{low} {getattr(self, low)} must lie between 0 and model.rope.{high} "
                    f"{getattr(self, high)}"
                )


def angles(
    rope: Rope,
    length: int,
    head_dim: int,
    theta: float,
    context: int,
    positions_T: Int[Array, "T"] | None = None,
) -> tuple[Float[Array, "T J"], Float[Array, "T J"]]:
    """Returns cos and sin of every position's angles, float32, times the attention factor of yarn.

    Args:
      rope: the scaling.
      length: tokens of the longest sequence.
      head_dim: width of a head, 2J.
      theta: base of the frequencies: pair j turns by theta^(-j/J) a token, if nothing is scaled.
      context: max_position_embeddings, beyond which "dynamic" scales.
      positions_T: where each token stands, from 0; None for 0, 1, ... up to length.

    Example:
      >>> cos, _ = angles(Rope("linear", factor=2.0), 4, 8, 10_000.0, 4)
      >>> cos.shape, round(float(cos[2, 0]), 4)
      ((4, 4), 0.5403)
    """
    if rope.type == "default":
        exponents_J = jnp.arange(head_dim // 2, dtype=jnp.float32) * (2 / head_dim)
        angles_TJ = _column(length, positions_T) / (theta**exponents_J)[None, :]
        return jnp.cos(angles_TJ), jnp.sin(angles_TJ)
    frequencies_J = _frequencies(rope, length, head_dim, theta, context).astype(np.float32)
    angles_TJ = _column(length, positions_T) * frequencies_J[None, :]
    scale = _attention_factor(rope) if rope.type == "yarn" else 1.0
    return jnp.cos(angles_TJ) * scale, jnp.sin(angles_TJ) * scale


def _column(length: int, positions_T: Array | None) -> Array:
    at_T = jnp.arange(length, dtype=jnp.float32) if positions_T is None else positions_T.astype(jnp.float32)
    return at_T[:, None]


def _frequencies(rope: Rope, length: int, head_dim: int, theta: float, context: int) -> np.ndarray:
    """Returns by how much each pair turns a token, in radians and float64: constants of a program."""
    if rope.type == "dynamic":
        longer = rope.factor * max(length, context) / context - (rope.factor - 1)
        theta *= longer ** (head_dim / (head_dim - 2))
    plain_J = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    scaled_J = plain_J / rope.factor
    if rope.type == "linear":
        return scaled_J
    if rope.type == "llama3":
        turns_J = rope.original_max_position_embeddings * plain_J / (2 * math.pi)
        kept_J = (turns_J - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    elif rope.type == "yarn":
        kept_J = 1 - _ramp(rope, head_dim, theta)
    else:
        return plain_J
    kept_J = np.clip(kept_J, 0, 1)
    return kept_J * plain_J + (1 - kept_J) * scaled_J


def _ramp(rope: Rope, head_dim: int, theta: float) -> np.ndarray:
    """Returns yarn's ramp: below 0 for pairs that turn beta_fast times, above 1 from beta_slow times on."""

    def pair(turns: float) -> float:
        wavelength = rope.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(theta))

    first, last = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = last - first or 0.001  # as in transformers
    return (np.arange(head_dim // 2) - first) / width


def _attention_factor(rope: Rope) -> float:
    def of(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1

    if rope.attention_factor:
        return rope.attention_factor
    return of(rope.mscale) / of(rope.mscale_all_dim) if rope.mscale and rope.mscale_all_dim else of(1)
