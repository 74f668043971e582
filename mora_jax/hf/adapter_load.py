"""Adapters of a Hugging Face folder, PEFT's or those of MoRA's authors, read without torch."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mora_jax import trees
from mora_jax.errors import InputError, some
from mora_jax.hf.adapter_config import ADAPTER_CONFIG, AdapterConfig, read_adapter_config
from mora_jax.hf.hub import local_folder
from mora_jax.hf.names import EMBEDDING, HEAD, Shapes, compare, parameter_shapes, places
from mora_jax.hf.safetensors import Stored, read_file
from mora_jax.methods import Method, from_json
from mora_jax.methods.peft import MAGNITUDE
from mora_jax.methods.registry import stated
from mora_jax.models.llama import STACKED, LlamaConfig
from mora_jax.transform import Methods, Params, Rules, Tree, assign

ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE_HASH = "base_sha256"  # in the metadata of our files
PREFIX = "base_model.model."


class KernelAdapter(NamedTuple):
    """The adapter of one linear layer in a file.

    Attributes:
      method: what its tensors mean.
      tensors: `lora_A` and so on.
      k: inputs of the layer.
      d: its outputs.
    """

    method: Method
    tensors: Mapping[str, Stored]
    k: int
    d: int

    def arrays(self) -> dict[str, jax.Array]:
        """Reads the arrays of the method, float32."""
        read = {name: jnp.asarray(stored.array(), jnp.float32) for name, stored in self.tensors.items()}
        return self.method.peft_arrays(read, self.k, self.d)


class AdapterFile(NamedTuple):
    """An adapter's file, whose header was read and fits the base.

    Attributes:
      folder: where it lies.
      config: its adapter_config.json.
      kernels: the adapters by the base's tensors.
      saved: tensors that replace those of the base.
      base_hash: hash of the base beside which it was trained, empty if the file does not say it.
    """

    folder: epath.Path
    config: AdapterConfig
    kernels: Mapping[str, KernelAdapter]
    saved: Mapping[str, Stored]
    base_hash: str


def read_adapter(path: epath.PathLike, shapes: Shapes) -> AdapterFile:
    """Returns the adapters of a folder. Reads its config and the header of its tensors.

    Args:
      path: a folder, or the id of one on the Hub.
      shapes: the tensors of the base, by name; without the head if it is tied.

    Raises:
      InputError: if the folder is incomplete or damaged, its config has an effect that we do not compute, or
        names or shapes do not fit the base.
    """
    folder = local_folder(path)
    file = folder / ADAPTER_CONFIG
    config = read_adapter_config(file)
    if (folder / "adapter_model.bin").exists() and not (folder / ADAPTER_WEIGHTS).exists():
        raise InputError(
            f"{folder} holds a pickle, adapter_model.bin, which can run code and is never opened; load the "
            f"adapter with PEFT and save it with safe_serialization=True"
        )
    tensors, metadata = read_file(folder / ADAPTER_WEIGHTS)
    modules = {name: name.rpartition(".")[0] for name in shapes}
    linear = {m: n for n, m in modules.items() if n.endswith(".weight") and len(shapes[n]) == 2}
    linear.pop(modules[EMBEDDING], None)
    tied = HEAD not in shapes
    config.check_modules(linear, {*modules.values(), "lm_head"}, file)
    kernels, wanted = {}, {}
    for module, name in linear.items():
        if not config.saves(module) and config.adapts(module):
            kernels[name] = _kernel(config, module, shapes[name], tensors, file)
            wanted |= {_stored_name(module, n): s for n, s in _tensor_shapes(*kernels[name][:3]).items()}
    saved = {name: f"{PREFIX}{name}" for name, module in modules.items() if config.saves(module)}
    if tied and (EMBEDDING in saved or config.saves("lm_head")):
        _check_tied_head(tensors, folder)
        tensors = {name: tensor for name, tensor in tensors.items() if name != f"{PREFIX}{HEAD}"}
    wanted |= {stored: shapes[name] for name, stored in saved.items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    compare(found, wanted, f"the adapters in {folder} do not fit the base")
    kernels = {name: _with_tensors(kernel, name, tensors) for name, kernel in kernels.items()}
    saved = {name: tensors[stored] for name, stored in saved.items()}
    return AdapterFile(folder, config, kernels, saved, str(metadata.get(BASE_HASH, "")))
