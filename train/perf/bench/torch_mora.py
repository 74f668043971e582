"""MoRA in PyTorch, written as the paper's equations read, for comparison.

It needs the extra `parity`.
"""

# Pyright also runs without PyTorch, which is an extra.
# pyright: reportMissingImports=false, reportOptionalMemberAccess=false

import math

import torch
from torch import nn
from torch.nn import functional


class MoraLinear(nn.Module):
    """A frozen linear layer plus the update of a square matrix M (Eq. 3).

    Args:
      base: the layer to adapt.
      rank: the LoRA rank whose parameter count is matched.
      dtype: dtype of M.
    """

    def __init__(self, base: nn.Linear, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.base = base
        self.d, self.k = base.weight.shape
        self.r_hat = (
            min(math.isqrt((self.d + self.k) * rank), self.d, self.k) // self.multiple * self.multiple
        )
        # Products with the initial zeros would be faster than those of training.
        self.m = nn.Parameter(
            0.001 * torch.randn(self.r_hat, self.r_hat, dtype=dtype, device=base.weight.device)
        )

    multiple = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., k) -> (..., d)."""
        return self.base(x) + self.decompress(functional.linear(self.compress(x), self.m))

    def compress(self, x: torch.Tensor) -> torch.Tensor:
        """(..., k) -> inputs of M."""
        raise NotImplementedError

    def decompress(self, y: torch.Tensor) -> torch.Tensor:
        """Outputs of M -> (..., d)."""
        raise NotImplementedError

    def blocks(self, x: torch.Tensor) -> torch.Tensor:
        """(..., k) -> (..., blocks, r_hat), with zeros at the end of the last block."""
        x = functional.pad(x, (0, -self.k % self.r_hat))
        return x.reshape(*x.shape[:-1], -1, self.r_hat)


class SharingLinear(MoraLinear):
    """Sharing (Eq. 6): the inputs of a group are summed, the outputs of a group are equal."""

    def compress(self, x: torch.Tensor) -> torch.Tensor:
        """(..., k) -> (..., r_hat), the sum of the blocks."""
        return self.blocks(x).sum(dim=-2)

    def decompress(self, y: torch.Tensor) -> torch.Tensor:
        """(..., r_hat) -> (..., d), repeating the r_hat outputs."""
        copies = -(-self.d // self.r_hat)
        return y.repeat(*(1,) * (y.ndim - 1), copies)[..., : self.d]


class RotatingLinear(MoraLinear):
    """Rotation (Eq. 9 to 11): M multiplies each block of inputs, rotated by angles of its own."""

    multiple = 2
    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, base: nn.Linear, rank: int, dtype: torch.dtype) -> None:
        super().__init__(base, rank, dtype)
        blocks = -(-self.k // self.r_hat)
        theta = 10_000.0 ** (-torch.arange(0, self.r_hat, 2, device=base.weight.device) / self.r_hat)
        angles = torch.arange(blocks, device=base.weight.device)[:, None] * torch.cat([theta, theta])
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def compress(self, x: torch.Tensor) -> torch.Tensor:
        """(..., k) -> (..., blocks, r_hat), rotated; at most as many blocks as the outputs have."""
        x = self.blocks(x)[..., : -(-self.d // self.r_hat), :]
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        cos, sin = self.cos[: x.shape[-2]].to(x.dtype), self.sin[: x.shape[-2]].to(x.dtype)
        return x * cos + turned * sin

    def decompress(self, y: torch.Tensor) -> torch.Tensor:
        """(..., blocks, r_hat) -> (..., d), repeating the concatenated blocks."""
        y = y.flatten(-2)
        copies = -(-self.d // y.shape[-1])
        return y.repeat(*(1,) * (y.ndim - 1), copies)[..., : self.d]
