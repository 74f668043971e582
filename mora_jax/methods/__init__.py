"""The methods: one file each, and an entry in METHODS."""

from mora_jax.methods.base import Adapter, Bound, Leaf, Method
from mora_jax.methods.dora import DoRA
from mora_jax.methods.linear import Path, dense
from mora_jax.methods.lora import LoRA
from mora_jax.methods.mora import MoRA
from mora_jax.methods.operators import Decouple, Operator, Rotate, Share, Truncate
from mora_jax.methods.registry import METHODS, OPERATORS, from_json, to_json
from mora_jax.methods.spectral import Spectral

__all__ = [
    "METHODS",
    "OPERATORS",
    "Adapter",
    "Bound",
    "Decouple",
    "DoRA",
    "Leaf",
    "LoRA",
    "Method",
    "MoRA",
    "Operator",
    "Path",
    "Rotate",
    "Share",
    "Spectral",
    "Truncate",
    "dense",
    "from_json",
    "to_json",
]
