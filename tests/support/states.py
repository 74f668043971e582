"""A sharded state to save in checkpoints, and damage to its files."""

import random
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec


@struct.dataclass
class State:
    step: jax.Array
    params: Any
    adapters: Any
    opt_state: Any


def sharding(*spec: str | None) -> NamedSharding:
    return NamedSharding(jax.make_mesh((4,), ("data",)), PartitionSpec(*spec))


def a_state(seed: int = 0) -> State:
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    params = {
        "layers": {"q_proj": {"kernel": jax.random.normal(next(keys), (2, 8, 12))}},
        "norm": {"scale": jax.random.normal(next(keys), (12,)).astype(jnp.bfloat16)},
        "ids": jax.random.randint(next(keys), (5,), -(2**31), 2**31 - 1),
    }
    chain = optax.chain(optax.scale_by_adam(), optax.identity())
    opt_state = chain.init({"norm": params["norm"]})
    opt_state = jax.tree.map(lambda a: jax.random.normal(next(keys), a.shape).astype(a.dtype), opt_state)
    state = State(jnp.int32(seed), params, {}, opt_state)
    state = jax.device_put(state, sharding())
    state.params["layers"]["q_proj"]["kernel"] = jax.device_put(
        params["layers"]["q_proj"]["kernel"], sharding(None, "data")
    )
    return state


def abstract(state: Any, place: NamedSharding | None = None) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place or a.sharding), state)


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip_a_bit(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes()) or bytearray(1)
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
