"""How arrays lie on devices: a mesh of three axes, layouts that owners of arrays state, and constraints.

The axes of the mesh: `data` replicates the state and divides the batch, `fsdp` divides both, `tensor` divides
heads and the MLP's width. Code inside jit sees a mesh only as the ambient one (`jax.set_mesh`). Without one,
or with a mesh of other axes, no function here does anything.
"""

from mora_jax.sharding.inside import (
    batch_shards,
    by_device,
    constrain,
    device_kind,
    divides_products,
    gathered,
    gathers,
    in_use,
    pin,
    scattered,
    tile,
    undivided,
    whole,
)
from mora_jax.sharding.mesh import (
    assembled,
    batch,
    local_rows,
    make_mesh,
    replicated,
    shardings,
    to_global,
)
from mora_jax.sharding.rules import (
    AXES,
    BATCH,
    COLUMNS,
    REPLICATED,
    ROWS,
    STATE,
    Box,
    Layout,
    Rules,
    find,
    spec,
)

__all__ = [
    "AXES",
    "BATCH",
    "COLUMNS",
    "REPLICATED",
    "ROWS",
    "STATE",
    "Box",
    "Layout",
    "Rules",
    "assembled",
    "batch",
    "batch_shards",
    "by_device",
    "constrain",
    "device_kind",
    "divides_products",
    "find",
    "gathered",
    "gathers",
    "in_use",
    "local_rows",
    "make_mesh",
    "pin",
    "replicated",
    "scattered",
    "shardings",
    "spec",
    "tile",
    "to_global",
    "undivided",
    "whole",
]
