"""What a model computes the loss of: tokens, and what counts of them.

Legend of shapes in names: B batch, T sequence.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens_BT", "weights_BT", "segments_BT", "positions_BT"],
    meta_fields=["most_segments"],
)
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of tokens. The default is pretraining: each row is one sequence, of which every token counts.

    Attributes:
      tokens_BT: the tokens.
      weights_BT: how much the loss counts of each token, as the one to predict; None for 1. The first token
        of a segment is never predicted, whatever its weight.
      segments_BT: the sequence that each token belongs to, from 1, in order; 0 for padding behind them.
        Tokens attend to their own segment only. None if each row is one sequence.
      positions_BT: the position of each token for the rotary embedding; None to count from the first token
        of each segment.
      most_segments: most segments of a row, padding included, by which attention chooses its kernel; 0 if
        that is not known.

    Example:
      >>> batch = Batch(jnp.array([[5, 6, 7, 8]]), segments_BT=jnp.array([[1, 1, 2, 2]]))
      >>> batch.positions().tolist(), batch.target_weights().tolist()
      ([[0, 1, 0, 1]], [[1.0, 0.0, 1.0, 0.0]])
    """

    tokens_BT: Int[Array, "B T"]
    weights_BT: Float[Array, "B T"] | None = None
    segments_BT: Int[Array, "B T"] | None = None
    positions_BT: Int[Array, "B T"] | None = None
    most_segments: int = 0

    def positions(self) -> Int[Array, "B T"]:
        """Returns the position of each token: as given, or counted from the first token of its segment."""
        if self.positions_BT is not None:
            return self.positions_BT
        at_BT = jnp.broadcast_to(jnp.arange(self.tokens_BT.shape[1]), self.tokens_BT.shape)
        if self.segments_BT is None:
            return at_BT
        begins_BT = self.segments_BT != jnp.roll(self.segments_BT, 1, axis=1)
        starts_BT = jnp.where(begins_BT.at[:, 0].set(True), at_BT, 0)
        return at_BT - jax.lax.cummax(starts_BT, axis=1)

    def target_weights(self) -> Float[Array, "B T"]:
        """Returns how much the loss counts of the token that follows each position, 0 where there is none."""
        rows, length = self.tokens_BT.shape
        weights_BT = jnp.broadcast_to(jnp.arange(length) < length - 1, (rows, length)).astype(jnp.float32)
        if self.weights_BT is not None:
            weights_BT *= jnp.roll(self.weights_BT, -1, axis=1)
        if self.segments_BT is not None:
            same_BT = self.segments_BT == jnp.roll(self.segments_BT, -1, axis=1)
            weights_BT *= same_BT & (self.segments_BT > 0)
        return weights_BT
