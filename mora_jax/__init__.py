"""MoRA and its relatives as a functional transform over Flax parameter trees."""

import importlib
from typing import Any

from mora_jax.adapter_file import load, save
from mora_jax.errors import InputError
from mora_jax.frontends import adapted, value_and_grad
from mora_jax.hf import load_adapter, load_hf, save_adapter, save_hf
from mora_jax.methods import (
    METHODS,
    OPERATORS,
    Adapter,
    Bound,
    Decouple,
    DoRA,
    Leaf,
    LoRA,
    Method,
    MoRA,
    Operator,
    Rotate,
    Share,
    Spectral,
    Truncate,
    dense,
)
from mora_jax.models.llama import Compute, Llama, LlamaConfig
from mora_jax.models.rope import Rope
from mora_jax.on import On
from mora_jax.orienting import orient
from mora_jax.report import describe
from mora_jax.sharding import Layout
from mora_jax.spectrum import singular_values
from mora_jax.state import State
from mora_jax.transform import (
    Group,
    Methods,
    assign,
    attach,
    bind,
    labels,
    merge,
    partition,
    restart,
)
from mora_jax.trees import combine

__all__ = [
    "METHODS",
    "OPERATORS",
    "Adapter",
    "Bound",
    "Compute",
    "Decouple",
    "DoRA",
    "Group",
    "InputError",
    "Layout",
    "Leaf",
    "Llama",
    "LlamaConfig",
    "LoRA",
    "Method",
    "Methods",
    "MoRA",
    "On",
    "Operator",
    "Rope",
    "Rotate",
    "Share",
    "Spectral",
    "State",
    "Truncate",
    "adapted",
    "assign",
    "attach",
    "bind",
    "combine",
    "dense",
    "describe",
    "labels",
    "load",
    "load_adapter",
    "load_hf",
    "merge",
    "orient",
    "partition",
    "restart",
    "save",
    "save_adapter",
    "save_hf",
    "singular_values",
    "value_and_grad",
]


def __getattr__(name: str) -> Any:
    if name == "nnx":  # it imports flax.nnx, which takes long
        return importlib.import_module("mora_jax.nnx")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
