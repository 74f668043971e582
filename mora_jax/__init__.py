"""MoRA and its relatives as a functional transform over Flax parameter trees."""

from mora_jax.errors import InputError
from mora_jax.llama import Compute, Llama, LlamaConfig
from mora_jax.methods import METHODS, OPERATORS, Adapter, Leaf, LoRA, Method, MoRA, Operator, Share, dense
from mora_jax.transform import (
    Methods,
    assign,
    attach,
    bind,
    labels,
    merge,
    partition,
    restart,
)

__all__ = [
    "METHODS",
    "OPERATORS",
    "Adapter",
    "Compute",
    "InputError",
    "Leaf",
    "Llama",
    "LlamaConfig",
    "LoRA",
    "Method",
    "Methods",
    "MoRA",
    "Operator",
    "Share",
    "assign",
    "attach",
    "bind",
    "dense",
    "labels",
    "merge",
    "partition",
    "restart",
]
