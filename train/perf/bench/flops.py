"""The floating-point operations that a training step cannot do without."""

import dataclasses
import math
from typing import Any

from mora_jax import trees
from mora_jax.transform import Methods

FROZEN = 4  # two for the output, two for the gradient of the input
TRAINED = 6  # and two for the gradient of the weight


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations a token, a product and a sum counting two.

    Attributes:
      base: of the model's own kernels.
      adapters: of the adapters, as if their parameters were one kernel each, without any padding.
    """

    base: float
    adapters: float


def needed(params: Any, methods: Methods) -> Flops:
    """4 a token for each frozen weight and 6 for each trained one, the adapters' among them.

    Counted are kernels. Looking up an embedding is no product, scales of norms are too few to count, and the
    products of attention between tokens and whatever is computed again to save memory are left out.

    Args:
      params: the model's parameters, or their shapes.
      methods: what is done with each.
    """
    base = adapters = 0.0
    flat = trees.flatten(params)
    tied = "lm_head/kernel" not in flat
    for path, leaf in flat.items():
        choice = methods[path]
        if path.endswith("kernel") or (tied and path == "embed_tokens/embedding"):
            base += math.prod(leaf.shape) * (TRAINED if choice == "train" else FROZEN)
        if not isinstance(choice, str):
            adapters += TRAINED * choice.count(*leaf.shape[-2:]) * math.prod(leaf.shape[:-2])
    return Flops(base, adapters)
