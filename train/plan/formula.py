"""What a training step is expected to send, from shapes and shardings alone.

Every figure is what one device sends in one step by ring algorithms, over the n devices of an axis:

- fsdp: each microbatch gathers every divided array, kernels in the type of the products and others in their
  own, for the forward and again for the backward pass (embedding and head once): (n - 1) / n of its bytes. It
  scatters the gradient of every trained one, adapters' in the type of the products and others in float32:
  (n - 1) / n of its bytes.
- data, and fsdp too for arrays that are whole on each device: each microbatch sums the gradient of every
  trained array, or of the part of it that a device holds: 2 (n - 1) / n of its bytes.
- tensor: each microbatch sums the outputs of attention and MLP of every layer in the forward pass and the
  gradients of their inputs in the backward pass: four times 2 (n - 1) / n of a device's activations.

A compiler that sends more moves something twice, in a wider type, or where it need not.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mora_jax import transform, trees
from mora_jax.transform import Methods
from train.config import RunConfig
from train.plan.hlo import SENT

ONCE = ("embed_tokens/embedding", "lm_head/kernel")  # used in one pass only


@dataclasses.dataclass(frozen=True)
class Expected:
    """One line of the formula.

    Attributes:
      kind: of collective, as HLO names it.
      axes: axes of the mesh, joined by "+".
      base: bytes that each device sends in a step for the model's own parameters and activations.
      adapters: the same for the adapters' arrays.
    """

    kind: str
    axes: str
    base: int
    adapters: int


def expected(config: RunConfig, methods: Methods, state: Any, mesh: Mesh) -> list[Expected]:
    """The formula's figures for a state of shapes with shardings, the largest first."""
    sent: Counter[tuple[str, str, bool]] = Counter()
    trained = transform.trainable_paths(methods)
    for path, leaf in trees.flatten({"params": state.params, "adapters": state.adapters}).items():
        for kind, axes, size in _of_array(path, leaf, path in trained, config, mesh.shape):
            sent[kind, axes, path.startswith("adapters/")] += round(size * config.microbatches)
    sent["all-reduce", "tensor", False] += _activations(config, mesh.shape)
    pairs = {(kind, axes) for (kind, axes, _), size in sent.items() if size}
    lines = [Expected(*pair, sent[(*pair, False)], sent[(*pair, True)]) for pair in pairs]
    return sorted(lines, key=lambda line: -line.base - line.adapters)


def _of_array(
    path: str, leaf: Any, trained: bool, config: RunConfig, mesh: Mapping[str, int]
) -> Iterator[tuple[str, str, float]]:
    """(kind, axes, bytes) of what one microbatch sends for one array."""
    divided = _divided(leaf)
    products = jnp.dtype(config.compute.dtype)
    mine = leaf.size / math.prod(mesh[axis] for axis in divided if axis != "fsdp")
    if "fsdp" in divided:
        kind = products if path.endswith("kernel") else leaf.dtype
        uses = 1 if path.endswith(ONCE) else 2
        yield "all-gather", "fsdp", uses * mine * kind.itemsize * SENT["all-gather"](mesh["fsdp"])
    if not trained:
        return
    gradient = products.itemsize if path.startswith("adapters/") else 4
    if "fsdp" in divided:
        yield "reduce-scatter", "fsdp", mine * gradient * SENT["reduce-scatter"](mesh["fsdp"])
        mine /= mesh["fsdp"]
    axes = [a for a in ("data", "fsdp") if mesh[a] > 1 and a not in divided]
    if axes:
        count = math.prod(mesh[axis] for axis in axes)
        yield "all-reduce", "+".join(axes), mine * gradient * SENT["all-reduce"](count)


def _activations(config: RunConfig, mesh: Mapping[str, int]) -> int:
    """Bytes a step over `tensor`."""
    shards = mesh["data"] * mesh["fsdp"]
    entries = config.tokens_per_step() / shards * config.model.hidden_size * config.model.num_hidden_layers
    size = entries * jnp.dtype(config.compute.dtype).itemsize
    return round(4 * size * SENT["all-reduce"](mesh["tensor"]))


def _divided(leaf: jax.ShapeDtypeStruct) -> set[str]:
    """The axes of the mesh that an array is divided along."""
    entries = leaf.sharding.spec  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    return {a for entry in entries if entry for a in (entry if isinstance(entry, tuple) else (entry,))}
