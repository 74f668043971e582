"""Keys and values of earlier tokens, so that a new token computes nothing of them again.

Legend of shapes in names: L layers, B batch, T new tokens, S slots, K key/value heads, H head width.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from mora_jax import sharding
from mora_jax.models.config import LlamaConfig
from mora_jax.sharding import BATCH, Layout

_STACKED = Layout((P(None, BATCH, None, "tensor", None),))


class KeyValues(NamedTuple):
    """Keys and values of tokens, with a leading axis if they are of all layers."""

    k_BSKH: Float[Array, "*L B S K H"]
    v_BSKH: Float[Array, "*L B S K H"]

    def with_new(self, new: "KeyValues", at: Int[Array, ""] | None) -> "KeyValues":
        """Returns these with those of new tokens in the slots from `at` on."""
        assert at is not None
        place = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=at, axis=-3)
        return KeyValues(*map(place, self, new))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["layers", "starts_B", "end"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Cache:
    """What generation keeps of the tokens so far. Rows end in one slot and begin in slots of their own.

    Attributes:
      layers: keys and values of all layers; what lies before a row's start or behind the end has no meaning.
      starts_B: slot of each row's first token.
      end: slot of the next token.
    """

    layers: KeyValues
    starts_B: Int[Array, "B"]
    end: Int[Array, ""]

    @classmethod
    def empty(cls, config: LlamaConfig, dtype: str, starts_B: Int[Array, "B"], slots: int) -> "Cache":
        """Returns a cache of so many slots a row without a token."""
        shape = (config.num_hidden_layers, len(starts_B), slots)
        shape += (config.num_key_value_heads, config.head_width)
        zeros = sharding.constrain(jnp.zeros(shape, dtype), _STACKED)
        return cls(KeyValues(zeros, zeros), starts_B, jnp.zeros((), jnp.int32))

    def positions(self, count: int) -> Int[Array, "B T"]:
        """Returns where the next tokens stand in their rows, from 0; 0 for padding."""
        return jnp.maximum((self.end + jnp.arange(count))[None, :] - self.starts_B[:, None], 0)

    def extended(self, new: KeyValues) -> "Cache":
        """Returns the cache with the keys and values of the next tokens, of all layers."""
        layers = KeyValues(*(sharding.constrain(x, _STACKED) for x in self.layers.with_new(new, self.end)))
        return Cache(layers, self.starts_B, self.end + new.k_BSKH.shape[-3])
