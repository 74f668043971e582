"""What a training step is expected to send, from shapes and shardings alone.

Every figure is what one device sends in one step by ring algorithms, over the n devices of an axis:

- fsdp: each microbatch gathers every divided array, kernels in the type of the products and others in their
  own, for the forward and again for the backward pass (embedding and head once): (n - 1) / n of its bytes. It
  scatters the gradient of every trained one: (n - 1) / n of its bytes.
- data, and fsdp too for arrays that are whole on each device: each microbatch sums the gradient of every
  trained array, or of the part of it that a device holds: 2 (n - 1) / n of its bytes.
- tensor: each microbatch sums the outputs of attention and MLP of every layer in the forward pass and the
  gradients of their inputs in the backward pass: four times 2 (n - 1) / n of a device's activations.
  Adapters' arrays are gathered for both passes, and their gradients summed over `data` as a whole. MoRA's
  groups do not end where a kernel is divided: it gathers the activations on the divided side of every adapted
  kernel, counted once, in the backward pass, as on the merged path: (n - 1) / n of them. What embedding, head
  and loss send is left out, and so are kernels whose width the axis does not divide, which are gathered too.

Gradients are sent in float32; those of adapters in the type of the products, but for MoRA's on the merged
path, which large batches take: they are added up in float32 part by part of the batch.

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
from mora_jax.methods import MoRA
from mora_jax.methods.linear import merges_float32
from mora_jax.transform import Methods
from train.config.run import RunConfig
from train.perf.plan.hlo import SENT

FLOAT32 = 4  # bytes
ONCE = ("embed_tokens/embedding", "lm_head/kernel")  # used in one pass only
INWARD = ("o_proj/kernel", "down_proj/kernel")  # `tensor` divides their inputs, of others the outputs


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
    gradients = _gradients(config, methods)
    arrays = trees.flatten({"params": state.params, "adapters": state.adapters})
    for path, leaf in arrays.items():
        for kind, axes, size in _of_array(path, leaf, gradients.get(path, 0), config, mesh.shape):
            sent[kind, axes, path.startswith("adapters/")] += round(size * config.microbatches)
    sent["all-reduce", "tensor", False] += _summed(config, mesh.shape)
    sent["all-gather", "tensor", True] += _gathered(config, methods, arrays, mesh.shape)
    pairs = {(kind, axes) for (kind, axes, _), size in sent.items() if size}
    lines = [Expected(*pair, sent[(*pair, False)], sent[(*pair, True)]) for pair in pairs]
    return sorted(lines, key=lambda line: -line.base - line.adapters)


def _gradients(config: RunConfig, methods: Methods) -> dict[str, int]:
    """The bytes of a number of each trained array's gradient, as it is sent."""
    tokens, how = config.tokens_per_step() / config.microbatches, config.compute.adapter_path
    in_float32 = {
        f"adapters/{path}/m_RR"
        for path, method in methods.adapted()
        if how != "compressed" and merges_float32(tokens, how, [method])
        if isinstance(method, MoRA) and not method.dropout
    }
    products = jnp.dtype(config.compute.dtype).itemsize
    return {
        path: products if path.startswith("adapters/") and path not in in_float32 else FLOAT32
        for path in transform.trainable_paths(methods)
    }


def _of_array(
    path: str, leaf: Any, gradient: int, config: RunConfig, mesh: Mapping[str, int]
) -> Iterator[tuple[str, str, float]]:
    """(kind, axes, bytes) of what one microbatch sends for one array; `gradient` is 0 if it is frozen."""
    divided, adapter = _divided(leaf), path.startswith("adapters/")
    kernel = path.endswith("kernel")
    itemsize = (jnp.dtype(config.compute.dtype) if kernel else leaf.dtype).itemsize
    mine = leaf.size / math.prod(mesh[axis] for axis in divided if axis != "fsdp")
    if "fsdp" in divided:
        uses = 1 if path.endswith(ONCE) else 2
        yield "all-gather", "fsdp", uses * mine * itemsize * SENT["all-gather"](mesh["fsdp"])
    if "tensor" in divided and adapter:
        yield "all-gather", "tensor", 2 * leaf.size * itemsize * SENT["all-gather"](mesh["tensor"])
        mine = leaf.size
    if not gradient:
        return
    if "fsdp" in divided:
        yield "reduce-scatter", "fsdp", mine * gradient * SENT["reduce-scatter"](mesh["fsdp"])
        mine /= mesh["fsdp"]
    axes = [a for a in ("data", "fsdp") if mesh[a] > 1 and a not in divided]
    if axes:
        count = math.prod(mesh[axis] for axis in axes)
        yield "all-reduce", "+".join(axes), mine * gradient * SENT["all-reduce"](count)


def _summed(config: RunConfig, mesh: Mapping[str, int]) -> int:
    """Bytes a step of activations summed over `tensor`."""
    entries = 4 * config.model.hidden_size * config.model.num_hidden_layers
    return round(entries * _column(config, mesh) * SENT["all-reduce"](mesh["tensor"]))


def _gathered(config: RunConfig, methods: Methods, arrays: Mapping[str, Any], mesh: Mapping[str, int]) -> int:
    """Bytes a step of activations gathered over `tensor` for MoRA's gradients."""
    entries = 0
    for path, method in methods.adapted():
        *layers, k, d = arrays[f"params/{path}"].shape
        width = k if path.endswith(INWARD) else d
        if isinstance(method, MoRA) and width % mesh["tensor"] == 0:
            entries += math.prod(layers) * width
    return round(entries * _column(config, mesh) * SENT["all-gather"](mesh["tensor"]))


def _column(config: RunConfig, mesh: Mapping[str, int]) -> float:
    """Bytes of one entry of a hidden state, for all tokens that a device takes in a step."""
    tokens = config.tokens_per_step() / mesh["data"] / mesh["fsdp"]
    return tokens * jnp.dtype(config.compute.dtype).itemsize


def _divided(leaf: jax.ShapeDtypeStruct) -> set[str]:
    """The axes of the mesh that an array is divided along."""
    entries = leaf.sharding.spec  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    return {a for entry in entries if entry for a in (entry if isinstance(entry, tuple) else (entry,))}
