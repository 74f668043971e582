"""Predicts what a training step sends, from shapes and shardings alone.

Each figure is what one device sends in one step by ring algorithms, over the n devices of an axis:

- fsdp: each microbatch all-gathers every sharded array, kernels in the dtype of the products, others in
  their own, the embedding as kernels. It does so for the forward and for the backward pass (embedding and
  head once). Unrolled layers that keep activations keep kernels, too. That is (n - 1) / n of the bytes.
  It reduce-scatters the gradient of every trained one: (n - 1) / n of the bytes.
- data, and fsdp too for replicated arrays: each microbatch all-reduces the gradient of every trained array,
  or of the shard that a device holds: 2 (n - 1) / n of the bytes. Those of the residual stream's norms are
  summed over tensor, too, if each device has some of its tokens.
- tensor: each microbatch all-gathers the inputs of attention and MLP of every layer and reduce-scatters their
  outputs, and so it does with the gradients of outputs and inputs: four times 2 (n - 1) / n of a device's
  activations. Layers that keep the residual stream alone all-gather their inputs again. If neither sequences
  nor positions divide among devices, it all-reduces outputs and gradients of inputs: as many bytes.
  Arrays of adapters are all-gathered for both passes (M once where kernels are kept), and their complete
  gradients are summed over `data`.
  The groups of a method such as MoRA do not end where a kernel is sharded. On the merged path each device
  sums its own part of the width over them, and M's gradients are summed over tensor, too: (n - 1) / n of
  them if tensor shards M, twice that if it does not, or fsdp does, too. (The TPU compiler all-reduces them
  over data x tensor as well.) On the activation path it all-gathers the activations on the sharded side of
  every adapted kernel: (n - 1) / n of them, counted once, in the backward pass.

A tied embedding is all-gathered, and its gradient summed, twice: as embedding and as head.

Muon makes matrices orthogonal once in a step. The devices that hold parts of a matrix exchange them, so that
each takes complete matrices, an equal number of each shape, and exchange the results: 2 (n - 1) / n of what a
device takes, in float32. Zeros fill the stacks of matrices up to a multiple of the devices.

Left out are what embedding, last norm, head and loss send over tensor, the sums of squares of norms over all
heads (one number a token), and kernels whose width the axis does not divide (devices exchange their parts).

Gradients of kernels and embeddings are sent in `compute.gradient_sums`, those of norms and biases in float32,
and those of adapters in the dtype of the products. On the merged path, which large batches take, some methods
compute them part by part of the batch, and send them in `compute.gradient_sums` too. Those of methods that
are not additive, such as DoRA, follow from the kernel's gradient, which is sent in their place. What devices
then exchange of it over fsdp and tensor is left out: XLA gathers the gradients of some kernels, by no rule.

A compiler that sends more moves something twice, in a wider dtype, or needlessly.
"""

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mora_jax import trees
from mora_jax.methods.linear import merges_float32
from mora_jax.models.llama import RESIDUAL_PARTS, Compute
from mora_jax.sharding.rules import AXES, BATCH, divides, names
from mora_jax.transform import Methods
from train.config.run import RunConfig
from train.perf.plan.hlo import SENT
from train.step.optim import array_options

FLOAT32 = 4  # bytes
ONCE = ("embed_tokens/embedding", "lm_head/kernel")  # used in one pass only
INWARD = ("o_proj/kernel", "down_proj/kernel")  # `tensor` shards their inputs; of others the outputs


@dataclasses.dataclass(frozen=True)
class Expected:
    """One line of the formula.

    Attributes:
      kind: HLO's name of the collective.
      axes: axes of the mesh, joined by "+".
      base: bytes that each device sends in a step for the model's own parameters and activations.
      adapters: bytes that it sends for the arrays of adapters.
    """

    kind: str
    axes: str
    base: int
    adapters: int


def expected(config: RunConfig, methods: Methods, state: Any, mesh: Mesh) -> list[Expected]:
    """Returns the formula's figures for a state of shapes with shardings, the largest first."""
    sent: Counter[tuple[str, str, bool]] = Counter()
    gradients = _gradients(config, methods)
    arrays = trees.flatten({"params": state.params, "adapters": state.adapters})
    by_parts, keeps = _summed_by_parts(config, methods), _keeps(config.compute)
    adapted = {f"params/{path}" for path, _ in methods.adapted()}
    for path, leaf in arrays.items():
        once = path.endswith(ONCE) or (keeps and (path.endswith("kernel") or path in by_parts))
        uses = 2 if config.model.tie_word_embeddings and path.endswith("embedding") else 1
        of_tokens = _norms_tokens(path) and _in_parts(config, mesh.shape)
        sums = AXES if of_tokens or path in by_parts else BATCH
        for kind, axes, size in _of_array(path, leaf, gradients.get(path, 0), once, sums, config, mesh.shape):
            of_adapter = path.startswith("adapters/") or (path in adapted and kind != "all-gather")
            sent[kind, axes, of_adapter] += round(size * uses * config.microbatches)
    by_muon: dict[tuple[str, bool], list[Any]] = defaultdict(list)
    for path, options in array_options(config.optimizer, methods).items():
        if options.muon:
            by_muon[options.label, options.adapter].append(arrays[path])
    for (_, adapter), leaves in by_muon.items():
        for kind, axes, size in _of_muon(leaves, mesh.shape):
            sent[kind, axes, adapter] += round(size)
    for kind, size in _of_activations(config, mesh.shape):
        sent[kind, "tensor", False] += round(size)
    with jax.set_mesh(mesh):  # the order of sums and product depends on the kind of the devices
        sent["all-gather", "tensor", True] += _gathered(config, methods, arrays, mesh.shape)
    pairs = {(kind, axes) for (kind, axes, _), size in sent.items() if size}
    lines = [Expected(*pair, sent[(*pair, False)], sent[(*pair, True)]) for pair in pairs]
    return sorted(lines, key=lambda line: -line.base - line.adapters)


def _gradients(config: RunConfig, methods: Methods) -> dict[str, int]:
    """Returns the itemsize in which the gradient of each array is sent; others have none, or send none."""
    by_parts = _summed_by_parts(config, methods)
    products, sums = (jnp.dtype(t).itemsize for t in (config.compute.dtype, config.compute.gradient_sums))

    def itemsize(path: str) -> int:
        if path in by_parts or path.endswith(("kernel", "embedding")):
            return sums
        return products if path.startswith("adapters/") else FLOAT32

    found = {path: itemsize(path) for path in methods.trainable()}
    for path, method in methods.adapted():
        if not method.additive:
            found |= {f"adapters/{path}/{name}": 0 for name in method.leaves()} | {f"params/{path}": sums}
    return found


def _summed_by_parts(config: RunConfig, methods: Methods) -> set[str]:
    """Returns the arrays of adapters whose gradients are summed part by part of the batch.

    They depend on inputs and gradients of outputs alone, not on the arrays themselves.
    """
    tokens, how = config.tokens_per_step() / config.microbatches, config.compute.adapter_path
    return {
        f"adapters/{path}/{name}"
        for path, method in methods.adapted()
        if how != "compressed" and config.base_dtype == "float32" and merges_float32(tokens, how, [method])
        if method.gradients_by_parts and not method.dropout
        for name in method.leaves()
    }


def _of_array(
    path: str,
    leaf: Any,
    gradient: int,
    once: bool,
    sums: Sequence[str],
    config: RunConfig,
    mesh: Mapping[str, int],
) -> Iterator[tuple[str, str, float]]:
    """Yields (kind, axes, bytes) that one microbatch sends for an array.

    `gradient` is the itemsize of its gradient, 0 if none is sent, and `sums` are the axes whose devices have
    parts of it; `once` says whether the array is all-gathered for one pass only.
    """
    sharded, adapter = _sharded(leaf), path.startswith("adapters/")
    kernel = path.endswith(("kernel", "embedding"))
    itemsize = (jnp.dtype(config.compute.dtype) if kernel else leaf.dtype).itemsize
    held = leaf.size / math.prod(mesh[axis] for axis in sharded if axis != "fsdp")
    uses = 1 if once else 2
    if "fsdp" in sharded:
        yield "all-gather", "fsdp", uses * held * itemsize * SENT["all-gather"](mesh["fsdp"])
    if "tensor" in sharded and adapter:
        yield "all-gather", "tensor", uses * leaf.size * itemsize * SENT["all-gather"](mesh["tensor"])
        held = leaf.size
    if not gradient:
        return
    scattered = sharded.intersection(sums)
    if len(scattered) == 1:  # XLA scatters nothing over two axes
        (axis,) = scattered
        yield "reduce-scatter", axis, held * gradient * SENT["reduce-scatter"](mesh[axis])
        held /= mesh[axis]
    axes = [a for a in sums if mesh[a] > 1 and (a not in scattered or len(scattered) > 1)]
    if axes:
        count = math.prod(mesh[axis] for axis in axes)
        yield "all-reduce", "+".join(axes), held * gradient * SENT["all-reduce"](count)


def _of_muon(leaves: Sequence[Any], mesh: Mapping[str, int]) -> Iterator[tuple[str, str, float]]:
    """Yields (kind, axes, bytes) that a step sends to make the matrices of an optimizer group orthogonal."""
    counts: Counter[tuple[Any, Any]] = Counter()
    for leaf in leaves:
        *layers, k, d = leaf.shape
        counts[(k, d), tuple(_entries(leaf)[-2:])] += math.prod(layers)
    for (shape, entries), count in counts.items():
        axes = [axis for over in entries for axis in over]
        devices = math.prod(mesh[axis] for axis in axes)
        taken = math.ceil(count / devices) * math.prod(shape)
        for axis in axes:
            yield "all-to-all", axis, 2 * taken * FLOAT32 * SENT["all-to-all"](mesh[axis])


def _of_activations(config: RunConfig, mesh: Mapping[str, int]) -> Iterator[tuple[str, float]]:
    """Yields (kind, bytes) that a step sends over `tensor` between the residual stream and products."""
    passed = {"all-reduce": 4}
    if _in_parts(config, mesh):
        passed = {"all-gather": 6 if config.compute.remat == "full" else 4, "reduce-scatter": 4}
    for kind, times in passed.items():
        entries = times * config.model.hidden_size * config.model.num_hidden_layers
        yield kind, entries * _column(config, mesh) * SENT[kind](mesh["tensor"])


def _in_parts(config: RunConfig, mesh: Mapping[str, int]) -> bool:
    """Returns whether `tensor` divides the tokens of the residual stream."""
    rows = config.batch_size // config.microbatches
    shape = (rows, config.data.sequence_length, config.model.hidden_size)
    return any(divides(choice, shape, mesh) for choice in RESIDUAL_PARTS.choices[:-1])


def _norms_tokens(path: str) -> bool:
    """Returns whether an array is the scale of a norm of the residual stream, not of queries or keys."""
    return path.endswith("norm/scale") and not path.endswith(("q_norm/scale", "k_norm/scale"))


def _gathered(config: RunConfig, methods: Methods, arrays: Mapping[str, Any], mesh: Mapping[str, int]) -> int:
    """Returns the bytes a step of activations that are all-gathered over `tensor` for adapters' gradients."""
    sent, by_parts = 0.0, _summed_by_parts(config, methods)
    for path, method in methods.adapted():
        *layers, k, d = arrays[f"params/{path}"].shape
        width = k if path.endswith(INWARD) else d
        merged = by_parts.issuperset(f"adapters/{path}/{name}" for name in method.leaves())
        if method.gathers_activations and not merged and width % mesh["tensor"] == 0:
            sent += math.prod(layers) * width * _column(config, mesh)
    return round(sent * SENT["all-gather"](mesh["tensor"]))


def _keeps(compute: Compute) -> bool:
    """Returns whether kernels that were all-gathered are kept for the backward pass."""
    return compute.layers == "unrolled" and compute.remat == "none"


def _column(config: RunConfig, mesh: Mapping[str, int]) -> float:
    """Returns the bytes of one entry of a hidden state, for all tokens of a device in a step."""
    tokens = config.tokens_per_step() / mesh["data"] / mesh["fsdp"]
    return tokens * jnp.dtype(config.compute.dtype).itemsize


def _sharded(leaf: jax.ShapeDtypeStruct) -> set[str]:
    """Returns the axes of the mesh over which an array is sharded."""
    return {axis for entry in _entries(leaf) for axis in entry}


def _entries(leaf: jax.ShapeDtypeStruct) -> list[tuple[str, ...]]:
    """Returns the axes of the mesh over which each axis of an array is sharded."""
    entries = leaf.sharding.spec  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    return [names(entry) for entry in (*entries, *[None] * (leaf.ndim - len(entries)))]
