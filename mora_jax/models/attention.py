"""Grouped-query attention by one of three kernels, and the description of what a position attends to.

Legend of shapes in names: B batch, T sequence, S keys, N query heads, K key/value heads, H head width.
"""

import dataclasses
import functools
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from mora_jax import sharding
from mora_jax.errors import InputError
from mora_jax.models import cudnn
from mora_jax.sharding import BATCH, Layout

Kernel: TypeAlias = Literal["xla", "cudnn", "splash"]
# Activations with heads: (batch, sequence, heads, head width).
HEADS = Layout((P(BATCH, None, "tensor", None),))
ROWS_OF_TOKENS = Layout((P(BATCH, None),))
# Queries and keys that the splash kernel holds at a time: the largest that divides the sequence.
SPLASH_BLOCKS = (512, 256, 128)
_BLOCK_FIELDS = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["starts_B", "first", "segments_BT"],
    meta_fields=["window", "most_segments"],
)
@dataclasses.dataclass(frozen=True)
class Visible:
    """What a position attends to: itself and earlier positions, from which each kernel builds its mask.

    Attributes:
      window: how many, the position itself included; 0 for all.
      starts_B: the key of each row's first token, if keys before it are padding; None if there are none.
      first: the key of the first query, if earlier tokens have no query; None if each key has one.
      segments_BT: the segment of each token, to which its keys are restricted; None if a row is one segment.
      most_segments: most segments of a row, padding included; 0 if that is not known.
    """

    window: int = 0
    starts_B: Int[Array, "B"] | None = None
    first: Int[Array, ""] | None = None
    segments_BT: Int[Array, "B T"] | None = None
    most_segments: int = 0

    def within(self, length: int) -> "Visible":
        """Returns the same for sequences of a length: a window as long as these restricts nothing."""
        return dataclasses.replace(self, window=self.window if self.window < length else 0)

    def mask(self, queries: int, keys: int) -> Bool[Array, "B T S"]:
        """Returns which keys each query sees, of rows that have padding and keys without queries."""
        assert self.starts_B is not None
        assert self.first is not None
        at_1T1, at_11S = (self.first + jnp.arange(queries))[None, :, None], jnp.arange(keys)[None, None, :]
        seen_BTS = (at_11S <= at_1T1) & (at_11S >= self.starts_B[:, None, None])
        return seen_BTS & (at_1T1 - at_11S < self.window) if self.window else seen_BTS


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    visible: Visible = Visible(),
    kernel: Kernel = "xla",
) -> Float[Array, "B T N H"]:
    """Returns softmax(q k^T / sqrt(H)) v over the positions that are visible to each.

    With padding or keys without queries, it is computed by XLA whatever the kernel.

    Raises:
      InputError: if the splash kernel cannot divide the sequence into blocks.
    """
    visible = visible.within(k_BSKH.shape[1])
    if visible.starts_B is not None:
        mask_B1TS = visible.mask(q_BTNH.shape[1], k_BSKH.shape[1])[:, None]
        return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask_B1TS)
    if kernel == "splash":
        return _splash_by_device(q_BTNH, k_BSKH, v_BSKH, visible)
    segments_BT = visible.segments_BT
    packs = kernel == "cudnn" and cudnn.pays(q_BTNH.shape[1], visible.most_segments)
    if segments_BT is not None and packs and not visible.window:
        return cudnn.packed_attention(q_BTNH, k_BSKH, v_BSKH, segments_BT, visible.most_segments)
    same_B1TS = None if segments_BT is None else (segments_BT[:, :, None] == segments_BT[:, None, :])[:, None]
    window = (visible.window - 1, 0) if visible.window else None
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        mask=same_B1TS,
        is_causal=True,
        local_window_size=window,
        implementation=kernel,
    )


def check_splash(length: int) -> None:
    """Raises InputError if the splash kernel cannot divide sequences of this length into blocks."""
    if length % SPLASH_BLOCKS[-1]:
        raise InputError(
            f"compute.attention splash needs sequences of a multiple of {SPLASH_BLOCKS[-1]} tokens, "
            f"not {length}; use xla"
        )


def _splash_by_device(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, visible: Visible) -> Array:
    """Returns `_splash` of each device's own sequences and heads: GSPMD cannot divide a Pallas call."""
    check_splash(q_BTNH.shape[1])
    segments_BT = visible.segments_BT
    rows, layouts = ((), ()) if segments_BT is None else ((segments_BT,), (ROWS_OF_TOKENS,))
    function = functools.partial(_splash, visible.window)
    divided = sharding.by_device(function, (HEADS, HEADS, HEADS, *layouts), HEADS)
    return divided(q_BTNH, k_BTKH, v_BTKH, *rows)


def _splash(
    window: int, q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segments_BT: Array | None = None
) -> Array:
    """Returns attention by JAX's kernel for TPUs, which never holds the scores of a full sequence."""
    from jax.experimental.pallas.ops.tpu import splash_attention  # slow to import, and only for TPUs

    length, heads, width = q_BTNH.shape[1:]
    block = next(size for size in SPLASH_BLOCKS if length % size == 0)
    shape = (length, length)
    mask = (
        splash_attention.LocalMask(shape, (window - 1, 0), 0)
        if window
        else splash_attention.CausalMask(shape)
    )
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([mask] * heads),
        block_sizes=splash_attention.BlockSizes(**dict.fromkeys(_BLOCK_FIELDS, block)),
        head_shards=1,
        q_seq_shards=1,
    )
    q_BTNH = (q_BTNH.astype(jnp.float32) / width**0.5).astype(q_BTNH.dtype)  # the kernel does not scale
    q_BNTH, k_BKTH, v_BKTH = (x.swapaxes(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
    ids = None if segments_BT is None else splash_attention.SegmentIds(segments_BT, segments_BT)
    y_BNTH: Array = jax.vmap(kernel)(q_BNTH, k_BKTH, v_BKTH, ids)  # pyright: ignore[reportAssignmentType]
    return y_BNTH.swapaxes(1, 2)
