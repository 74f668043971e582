"""Counts the floating-point operations that a training step needs at least."""

import dataclasses
import math
from typing import Any

from mora_jax import trees
from mora_jax.report import count_trained
from mora_jax.transform import Methods

FROZEN = 4  # two for the output, two for the gradient of the input
TRAINED = 6  # two more for the gradient of the weight


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations a token. A multiplication and an addition count as two.

    Attributes:
      base: operations of the model's own kernels.
      adapters: operations of the adapters, as if the parameters of each were one kernel, without padding.
    """

    base: float
    adapters: float


def needed(params: Any, methods: Methods) -> Flops:
    """Returns 4 operations a token for each frozen weight and 6 for each trained one.

    Only kernels and adapters count. An embedding is looked up without a product, and the scales of norms are
    few. Products between tokens in attention, and recomputation, are left out.

    Args:
      params: the model's parameters, or their shapes.
      methods: the method of each parameter.
    """
    base = adapters = 0.0
    flat = trees.flatten(params)
    tied = "lm_head/kernel" not in flat
    for path, leaf in flat.items():
        choice = methods[path]
        if path.endswith("kernel") or (tied and path == "embed_tokens/embedding"):
            base += math.prod(leaf.shape) * (TRAINED if choice == "train" else FROZEN)
        if not isinstance(choice, str):
            adapters += TRAINED * count_trained(choice, leaf.shape)
    return Flops(base, adapters)
