"""Adapters merged into a Hugging Face folder, tensor by tensor: the host never holds the whole model."""

import shutil
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mora_jax.hf.adapter_load import AdapterFile, check_base, read_adapter
from mora_jax.hf.config import CONFIG, read_config
from mora_jax.hf.folder import whole_folder
from mora_jax.hf.hub import local_folder
from mora_jax.hf.safetensors import Stored
from mora_jax.hf.weights import read_weights, write_json, write_weights
from mora_jax.io import is_plain_file, read_object

# The ends of files that hold weights; all other files of a base are copied.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")


def merge_adapters(
    base: epath.PathLike,
    adapters: Sequence[tuple[epath.PathLike, float]],
    out: epath.PathLike,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
) -> int:
    """Merges adapters of PEFT, or of MoRA's authors, into a model, and writes it as a folder.

    A tensor W becomes W + the sum of weight (W' - W) over the adapters, where W' is W with that adapter
    alone, computed in float32. What else lies in the base's folder, such as the tokenizer, is copied.

    Args:
      base: folder of the model, or its id on the Hub.
      adapters: folders of adapters, or their ids on the Hub, each with its weight.
      out: the folder to make. It appears when it is complete.
      dtype: type of the written tensors; that of the base's by default.

    Returns:
      The number of tensors that were changed.

    Raises:
      InputError: if `out` exists and is not an empty folder, the base or an adapter is incomplete or damaged,
        or an adapter does not fit the base or was trained beside another one.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp
      >>> from mora_jax import Llama, LlamaConfig, LoRA, State, hf, save_adapter, save_hf
      >>> config = LlamaConfig(32, 8, 16, 1, 2, 2)
      >>> params = Llama(config).init(jax.random.key(0), jnp.ones((1, 4), jnp.int32))["params"]
      >>> state = State.init(jax.random.key(0), params, [("lm_head/kernel", LoRA(2)), (".*", "frozen")])
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     base, adapter = f"{folder}/base", f"{folder}/adapter"
      ...     save_hf(base, params, config)
      ...     _ = save_adapter(adapter, params, state.adapters, state.methods, config, base=base)
      ...     hf.merge_adapters(base, [(adapter, 0.5)], f"{folder}/merged")
      1
    """
    folder = local_folder(base)
    config = read_config(folder)
    stored = read_weights(folder, config)
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    found = [(read_adapter(path, shapes), weight) for path, weight in adapters]
    # The whole base is read for each hash, so adapters of one base are compared once.
    for adapter in {adapter.base_hash: adapter for adapter, _ in found}.values():
        check_base(adapter, folder, config)
    types = {name: jnp.dtype(dtype or tensor.dtype) for name, tensor in stored.items()}
    specs = {name: jax.ShapeDtypeStruct(shape, types[name]) for name, shape in shapes.items()}
    with whole_folder(out) as target:
        for file in folder.iterdir():
            if is_plain_file(file) and not file.name.endswith(_WEIGHTS) and not file.name.startswith("."):
                with file.open("rb") as source, (target / file.name).open("wb") as copy:
                    shutil.copyfileobj(source, copy)
        if dtype:
            said = read_object(target / CONFIG) | {"torch_dtype": dtype, "dtype": dtype}
            write_json(target / CONFIG, said)
        write_weights(target, specs, lambda name: _merged(name, stored[name], found))
    return len({name for adapter, _ in found for name in (*adapter.kernels, *adapter.saved)})


def _merged(name: str, stored: Stored, found: Sequence[tuple[AdapterFile, float]]) -> np.ndarray:
    """Returns a tensor with all adapters, in float32, or as it is stored if none changes it."""
    w = stored.array()
    alone = [(_alone(name, w, adapter), weight) for adapter, weight in found]
    changed = [(new, weight) for new, weight in alone if new is not None]
    if not changed:
        return w
    if len(changed) == 1 and changed[0][1] == 1:
        return changed[0][0]
    w = w.astype(np.float32)
    return w + sum(np.float32(weight) * (new - w) for new, weight in changed)


def _alone(name: str, w: np.ndarray, adapter: AdapterFile) -> np.ndarray | None:
    """Returns a tensor with one adapter, in float32, None if it changes nothing."""
    if name not in adapter.saved and name not in adapter.kernels:
        return None
    w = adapter.saved[name].array() if name in adapter.saved else w
    if name not in adapter.kernels:
        return w.astype(np.float32)
    kernel = adapter.kernels[name]
    weight = jax.jit(kernel.method.weight)  # compiled once for each method and shape
    return np.asarray(weight(kernel.arrays(kernel.method), w.astype(np.float32).T)).T
