"""The embedding: rows of a table, whose gradient is summed over devices in a type of choice.

Legend of shapes in names: V rows of the table, D width, B batch, T sequence, G shards of a batch.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mora_jax import sharding
from mora_jax.sharding import BATCH, COLUMNS, REPLICATED, ROWS, Layout

# Rows are divided if they can be. Then a device's part lies in one piece, as it is sent, and so does the row
# that a token's gradient is added to.
TABLE = Layout((P(("tensor", "fsdp"), None), *ROWS.choices), used=ROWS.used)
# The same of the transposed table, as the head of a model with tied embeddings.
TIED_HEAD = Layout((P(None, ("tensor", "fsdp")), *COLUMNS.choices), used=COLUMNS.used)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def lookup(
    table_VD: Float[Array, "V D"],
    tokens_BT: Int[Array, "B T"],
    layout: Layout = REPLICATED,
    dtype: DTypeLike = jnp.float32,
    sums: DTypeLike = jnp.float32,
) -> Float[Array, "B T D"]:
    """Returns the rows of a table that tokens name.

    Args:
      table_VD: the table.
      tokens_BT: rows to return.
      layout: how the table may be divided over an ambient mesh.
      dtype: type of the rows, in which a divided table is all-gathered.
      sums: type in which devices of a mesh send each other their parts of the table's gradient.

    Example:
      >>> import jax.numpy as jnp
      >>> from mora_jax.models.lookup import lookup
      >>> lookup(jnp.eye(3), jnp.array([[2, 0]])).tolist()
      [[[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]]
    """
    return _rows(table_VD, tokens_BT, layout, dtype)


def _rows(table_VD: Array, tokens_BT: Array, layout: Layout, dtype: DTypeLike) -> Array:
    return jnp.take(sharding.gathered(table_VD, layout, dtype), tokens_BT, axis=0).astype(dtype)


def _forward(
    table_VD: Array, tokens_BT: Array, layout: Layout, dtype: DTypeLike, sums: DTypeLike
) -> tuple[Array, tuple[Array, Array]]:
    # Plain, so that it has a forward mode.
    return _rows(table_VD, tokens_BT, layout, dtype), (table_VD, tokens_BT)


def _backward(
    layout: Layout, dtype: DTypeLike, sums: DTypeLike, saved: Any, dx_BTD: Array
) -> tuple[Array, None]:
    table_VD, tokens_BT = saved
    parts = math.gcd(sharding.batch_shards(), tokens_BT.shape[0])
    tokens_GT = tokens_BT.reshape(parts, -1)
    dx_GTD = dx_BTD.astype(table_VD.dtype).reshape(parts, -1, dx_BTD.shape[-1])
    # Every shard adds up the gradients of its own tokens.
    add = jax.vmap(lambda tokens_T, dx_TD: jnp.zeros_like(table_VD).at[tokens_T].add(dx_TD))
    parts_GVD = Layout((P(BATCH, *layout.used), P(BATCH)))
    dtable_GVD = sharding.constrain(add(sharding.by_batch(tokens_GT), sharding.by_batch(dx_GTD)), parts_GVD)
    return sharding.scattered(sharding.summed(dtable_GVD, sums), layout).astype(table_VD.dtype), None


lookup.defvjp(_forward, _backward)
