"""One kernel's adapter as the files of PEFT, and of the authors' fork of it, hold it."""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array

A, B, MAGNITUDE = "lora_A", "lora_B", "lora_magnitude_vector"


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["tensors"],
    meta_fields=["rank", "alpha", "rslora", "dora", "mora_type"],
)
@dataclasses.dataclass(frozen=True)
class PeftAdapter:
    """The adapter of a (k, d) kernel, in PyTorch's layout: (outputs, inputs).

    Attributes:
      tensors: `lora_A` (r, k), `lora_B` (d, r) and, for DoRA, `lora_magnitude_vector` (d,). In the authors'
        files of MoRA both `lora_A` and `lora_B` are M (r_hat, r_hat).
      rank: `r`: the width r, or the LoRA rank that M matches.
      alpha: `lora_alpha`.
      rslora: `use_rslora`.
      dora: `use_dora`.
      mora_type: the number of MoRA's operator in the authors' files; 0 in files of PEFT itself.
    """

    tensors: Mapping[str, Array]
    rank: float
    alpha: float
    rslora: bool = False
    dora: bool = False
    mora_type: int = 0

    @property
    def scale(self) -> float:
        """The factor before the product of the two matrices."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def padded(self, rank: int, scale: float) -> "PeftAdapter":
        """Returns an equal adapter of a larger rank, by padding with zeros, and of another scale."""
        more = rank - self.tensors[A].shape[0]
        a = jnp.pad(self.tensors[A], ((0, more), (0, 0)))
        b = jnp.pad(self.tensors[B] * (self.scale / scale), ((0, 0), (0, more)))
        tensors = {**self.tensors, A: a, B: b}
        return dataclasses.replace(self, tensors=tensors, rank=rank, alpha=scale * rank, rslora=False)
