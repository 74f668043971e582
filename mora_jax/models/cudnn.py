"""Packed attention by cuDNN, which reads only the keys of a segment. JAX 0.10 to 0.12 has it as an internal.

Legend of shapes in names: B batch, T sequence, N query heads, K key/value heads, H head width, M segments.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

NEWEST = (0, 13)  # of JAX, exclusive: its internals were tried before
# Below it, and with more segments, a mask is faster (H100: docs/performance.md).
SHORTEST, TOKENS_OF_SEGMENT = 1024, 64


def pays(length: int, most: int) -> bool:
    """Returns whether the packed layout is there and faster than a mask.

    Args:
      length: tokens of a row.
      most: most segments of a row; 0 if that is not known.
    """
    few = 0 < most <= length // TOKENS_OF_SEGMENT and length >= SHORTEST
    if not few or jax.__version_info__ >= NEWEST:
        return False
    device = jax.local_devices()[0]
    return device.platform == "gpu" and float(getattr(device, "compute_capability", 0)) >= 9  # Hopper


def packed_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    segments_BT: Int[Array, "B T"],
    most: int,
) -> Float[Array, "B T N H"]:
    """Returns causal attention within segments, in bfloat16.

    Args:
      q_BTNH: queries.
      k_BTKH: keys.
      v_BTKH: values.
      segments_BT: the segment of each token; equal numbers lie together.
      most: most segments of a row, padding included. More of them give wrong results.
    """
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    lengths_BM, starts_BM = ranges(segments_BT, most)
    y_BTNH: Any = dot_product_attention(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        q_seqlen=lengths_BM,
        kv_seqlen=lengths_BM,
        q_offsets=starts_BM,
        kv_offsets=starts_BM,
        scale=q_BTNH.shape[-1] ** -0.5,
        mask_type=MaskType.PADDING_CAUSAL,
    )
    return y_BTNH


def ranges(segments_BT: Int[Array, "B T"], most: int) -> tuple[Int[Array, "B M"], Int[Array, "B M+1"]]:
    """Returns the lengths and the starts of segments, in the form that cuDNN's wrapper takes: -1 for none.

    Example:
      >>> lengths_BM, starts_BM = ranges(jnp.array([[1, 1, 1, 2, 0]]), most=4)
      >>> lengths_BM.tolist(), starts_BM.tolist()
      ([[3, 1, 1, -1]], [[0, 3, 4, -1, -1]])
    """
    length = segments_BT.shape[1]
    begins_BT = (segments_BT != jnp.roll(segments_BT, 1, axis=1)).at[:, 0].set(True)
    find = jax.vmap(lambda begins_T: jnp.nonzero(begins_T, size=most + 1, fill_value=length)[0])
    starts_BM = find(begins_BT).astype(jnp.int32)
    real_BM = starts_BM < length
    lengths_BM = jnp.where(real_BM[:, :-1], starts_BM[:, 1:] - starts_BM[:, :-1], -1)
    return lengths_BM, jnp.where(real_BM, starts_BM, -1).at[:, -1].set(-1)
