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
from mora_jax.sharding import BATCH, Layout

Kernel: TypeAlias = Literal["xla", "cudnn", "splash"]
# Activations with heads: (batch, sequence, heads, head width).
HEADS = Layout((P(BATCH, None, "tensor", None),))
# Queries and keys that the splash kernel holds at a time: the largest that divides the sequence.
SPLASH_BLOCKS = (512, 256, 128)
_BLOCK_FIELDS = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["starts_B", "first"], meta_fields=["window"]
)
@dataclasses.dataclass(frozen=True)
class Visible:
    """What a position attends to: itself and earlier positions, from which each kernel builds its mask.

    Attributes:
      window: how many, the position itself included; 0 for all.
      starts_B: the key of each row's first token, if keys before it are padding; None if there are none.
      first: the key of the first query, if earlier tokens have no query; None if each key has one.
    """

    window: int = 0
    starts_B: Int[Array, "B"] | None = None
    first: Int[Array, ""] | None = None

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
    if kernel != "splash":
        window = (visible.window - 1, 0) if visible.window else None
        return jax.nn.dot_product_attention(
            q_BTNH, k_BSKH, v_BSKH, is_causal=True, local_window_size=window, implementation=kernel
        )
    check_splash(q_BTNH.shape[1])
    # GSPMD cannot divide a Pallas call, so each device computes its own sequences and heads.
    return sharding.by_device(functools.partial(_splash, visible), HEADS)(q_BTNH, k_BSKH, v_BSKH)


def check_splash(length: int) -> None:
    """Raises InputError if the splash kernel cannot divide sequences of this length into blocks."""
    if length % SPLASH_BLOCKS[-1]:
        raise InputError(
            f"compute.attention splash needs sequences of a multiple of {SPLASH_BLOCKS[-1]} tokens, "
            f"not {length}; use xla"
        )


def _splash(visible: Visible, q_BTNH: Array, k_BTKH: Array, v_BTKH: Array) -> Array:
    """Returns attention by JAX's kernel for TPUs, which never holds the scores of a full sequence."""
    from jax.experimental.pallas.ops.tpu import splash_attention  # slow to import, and only for TPUs

    length, heads, width = q_BTNH.shape[1:]
    block = next(size for size in SPLASH_BLOCKS if length % size == 0)
    shape, window = (length, length), visible.window
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
    y_BNTH: Array = jax.vmap(kernel)(q_BNTH, k_BKTH, v_BKTH)  # pyright: ignore[reportAssignmentType]
    return y_BNTH.swapaxes(1, 2)
