"""Adapters of a Hugging Face folder, PEFT's or those of MoRA's authors, read without torch."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from mora_jax import trees
from mora_jax.errors import InputError, some
from mora_jax.hf.adapter_config import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE_HASH,
    PREFIX,
    AdapterConfig,
    file_form,
    module_of,
    name_in_file,
    read_adapter_config,
)
from mora_jax.hf.hub import local_folder
from mora_jax.hf.names import EMBEDDING, HEAD, Shapes, compare_shapes, places, tensors
from mora_jax.hf.safetensors import Stored, read_file
from mora_jax.hf.weights import fingerprint, read_weights
from mora_jax.methods import Method, from_json
from mora_jax.methods.base import Arrays
from mora_jax.methods.registry import METHODS, flat_fields, stated, to_flat
from mora_jax.models.llama import STACKED, LlamaConfig
from mora_jax.transform import Methods, Params, Rules, Tree, assign


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

    def arrays(self, method: Method) -> Arrays:
        """Reads the arrays, float32, of a method that is `self.method` or stores them in another way."""
        read: Any = {name: stored.array().astype(np.float32) for name, stored in self.tensors.items()}
        return method.peft_arrays(read, self.k, self.d)


class AdapterFile(NamedTuple):
    """Adapters in a folder, whose header was read and fits the base.

    Attributes:
      folder: where they lie.
      config: adapter_config.json.
      kernels: the adapters, by the base's tensors.
      saved: tensors that replace those of the base, which may be adapted too.
      base_hash: hash of the base beside which they were trained, empty if the file does not say it.
    """

    folder: epath.Path
    config: AdapterConfig
    kernels: Mapping[str, KernelAdapter]
    saved: Mapping[str, Stored]
    base_hash: str


def load_adapter(
    path: epath.PathLike, params: Params, config: LlamaConfig, base: epath.PathLike = ""
) -> tuple[Params, Tree, Methods]:
    """Reads a folder of PEFT, or of MoRA's authors, as adapters of a model.

    Args:
      path: a folder with adapter_config.json and adapter_model.safetensors, or the id of one on the Hub.
      params: the parameters of the base, as `load_hf` returns them.
      config: its config.
      base: the folder that the base was read from, to compare it with the one that the adapters were trained
        beside; empty to compare nothing. Only files that `save_adapter` wrote with a hash say which it was.

    Returns:
      The parameters with those that the file holds as a whole (`modules_to_save`), the adapters as numpy
      arrays, and the methods, with "train" for the former.

    Raises:
      InputError: if the folder is incomplete or damaged, its config has an effect that we do not compute, it
        does not fit the base, it was trained beside another one, or layers differ in what the file adapts.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp
      >>> from mora_jax import Llama, LlamaConfig, LoRA, State, load_adapter, save_adapter
      >>> config = LlamaConfig(32, 8, 16, 1, 2, 2)
      >>> params = Llama(config).init(jax.random.key(0), jnp.ones((1, 4), jnp.int32))["params"]
      >>> rules = [("lm_head/kernel", LoRA(2)), (".*", "frozen")]
      >>> state = State.init(jax.random.key(0), params, rules)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = save_adapter(f"{folder}/a", params, state.adapters, state.methods, config, base="org/base")
      ...     load_adapter(f"{folder}/a", params, config)[2]["lm_head/kernel"].rank
      2
    """
    found = read_adapter(path, {name: place.shape for name, place in places(config).items()})
    if base:
        check_base(found, base, config)
    methods = assign(adapter_rules(found, config), params, STACKED)
    return *load_arrays(found, params, methods, config), methods


def read_adapter(path: epath.PathLike, shapes: Shapes) -> AdapterFile:
    """Returns the adapters of a folder. Reads their config and the header of their tensors.

    Args:
      path: a folder, or the id of one on the Hub.
      shapes: the tensors of the base, by name; without the head if it is tied.

    Raises:
      InputError: if the folder is incomplete or damaged, its config has an effect that we do not compute, or
        names or shapes do not fit the base.
    """
    folder = local_folder(path)
    config = read_adapter_config(folder / ADAPTER_CONFIG)
    stored, base_hash = _read_header(folder)
    modules = {name: module_of(name) for name in shapes}
    linear = {module: name for name, module in modules.items() if _is_linear(name, shapes[name])}
    config.check_modules(linear, {*modules.values(), "lm_head"}, folder / ADAPTER_CONFIG)
    saved = {name: name for name, module in modules.items() if config.saves(module)}
    if HEAD not in shapes and (EMBEDDING in saved or config.saves("lm_head")):
        _check_tied_head(stored, folder)
        stored.pop(HEAD)
    kernels, adapted = {}, {}
    for module, name in linear.items():
        if name not in saved and config.adapts(module):
            kernels[name] = kernel = _kernel(folder, config, module, shapes[name], stored)
            form = file_form(kernel.method, bool(config.mora_type), kernel.k, kernel.d)
            adapted |= {name_in_file(module, n): tensor.shape for n, tensor in form.tensors.items()}
            if f"{module}.base_layer.weight" in stored:  # PEFT adds the weights of an adapted head
                saved[name] = f"{module}.base_layer.weight"
    found = {name: tensor.shape for name, tensor in stored.items()}
    wanted = adapted | {in_file: shapes[name] for name, in_file in saved.items()}
    compare_shapes(found, wanted, f"the adapters in {folder} do not fit the base or their config")
    return AdapterFile(folder, config, kernels, {name: stored[n] for name, n in saved.items()}, base_hash)


def check_base(found: AdapterFile, base: epath.PathLike, config: LlamaConfig) -> None:
    """Raises InputError if adapters were trained beside other weights than a folder's, as far as is known."""
    if found.base_hash and found.base_hash != fingerprint(read_weights(local_folder(base), config)):
        raise InputError(
            f"{found.folder} was trained beside another base than {base}: their weights differ, though not "
            f"in shape"
        )


def adapter_rules(found: AdapterFile, config: LlamaConfig, given: Mapping[str, Any] | None = None) -> Rules:
    """Returns rules that adapt and train what a file holds, and freeze the rest.

    Args:
      found: the file.
      config: the base's config.
      given: fields of the methods, in their flat form, beside those that the file states.

    Raises:
      InputError: if layers differ in what the file holds of a parameter, or the file states another value of
        a given field.
    """
    rules = []
    for path in dict.fromkeys(place.path for place in places(config).values()):
        names = tensors(path, config.num_hidden_layers)
        kernels = {n: _method(found.config, module_of(n), given or {}) for n in names if n in found.kernels}
        choices = {kernels.get(n, "train" if n in found.saved else "frozen") for n in names}
        if len(choices) > 1:
            raise InputError(
                f"{found.folder}: layers differ in how {path} is adapted, one array for all of them; "
                f"mora merge merges such adapters"
            )
        choice = choices.pop()
        if choice != "frozen":
            rules.append((re.escape(path), choice))
    return [*rules, (".*", "frozen")]


def load_arrays(
    found: AdapterFile, params: Params, methods: Methods, config: LlamaConfig
) -> tuple[Params, Tree]:
    """Reads a file's tensors.

    Args:
      found: the file.
      params: the parameters of the base.
      methods: what is done with each parameter, from `adapter_rules` or from rules that agree with the file.
      config: the base's config.

    Returns:
      The parameters with those that the file holds as a whole, and the adapters as numpy arrays.

    Raises:
      InputError: if the methods do not agree with the file.
    """
    adapted = {
        tensor: on.method
        for path, on in methods.kernels()
        for tensor in tensors(path, config.num_hidden_layers)
    }
    trained = {tensor for path in methods.trained() for tensor in tensors(path, config.num_hidden_layers)}
    if other := sorted(
        (adapted.keys() ^ found.kernels.keys()) | (found.saved.keys() - adapted.keys() - trained)
    ):
        raise InputError(
            f"{found.folder} and the rules differ in whether {some(other)} is adapted or trained"
        )
    for tensor, method in adapted.items():
        _method(found.config, module_of(tensor), to_flat(method))
    return _with_saved(found, params, config), _read_arrays(found, methods, config)


def _read_arrays(found: AdapterFile, methods: Methods, config: LlamaConfig) -> Tree:
    """Reads the adapters of all kernels as numpy arrays, float32, layers stacked."""
    flat = {}
    for path, on in methods.kernels():
        names = tensors(path, config.num_hidden_layers)
        layers = [found.kernels[name].arrays(on.method) for name in names]
        for name in layers[0]:
            arrays = [np.asarray(layer[name]) for layer in layers]
            flat[f"{path}/{name}"] = np.stack(arrays) if on.stack else arrays[0]
    return trees.unflatten(flat)


def _with_saved(found: AdapterFile, params: Params, config: LlamaConfig) -> Params:
    """Returns the parameters with those that a file holds as a whole, in their types and on their devices."""
    old = trees.flatten(params)
    new: dict[str, list[np.ndarray]] = {}
    for name, place in places(config).items():
        if name in found.saved:
            array = found.saved[name].array().astype(old[place.path].dtype)
            new.setdefault(place.path, []).append(array.T if place.transpose else array)
    whole = {path: np.stack(a) if old[path].ndim > a[0].ndim else a[0] for path, a in new.items()}
    lying = {p: jax.device_put(a, old[p].sharding) for p, a in whole.items() if isinstance(old[p], jax.Array)}
    return trees.replaced(params, whole | lying)


def _read_header(folder: epath.Path) -> tuple[dict[str, Stored], str]:
    """Returns the tensors by their names in the base, and the base's hash."""
    file = folder / ADAPTER_WEIGHTS
    if not file.exists() and (folder / "adapter_model.bin").exists():
        raise InputError(
            f"{folder} holds a pickle, adapter_model.bin, which can run code and is never opened; load it "
            f"with PEFT and save it with safe_serialization=True"
        )
    stored, metadata = read_file(file)
    if other := [name for name in stored if not name.startswith(PREFIX)]:
        raise InputError(f"{file}: {other[0]!r} does not begin with {PREFIX!r}, as names of PEFT do")
    return {name.removeprefix(PREFIX): tensor for name, tensor in stored.items()}, str(
        metadata.get(BASE_HASH, "")
    )


def _kernel(
    folder: epath.Path,
    config: AdapterConfig,
    module: str,
    shape: tuple[int, ...],
    stored: Mapping[str, Stored],
) -> KernelAdapter:
    """Returns the adapter of a linear layer with a weight of this shape, and the tensors that it has."""
    (d, k), file = shape, folder / ADAPTER_CONFIG
    try:
        method = _method(config, module, {})
        form = file_form(method, bool(config.mora_type), k, d)
    except InputError as error:
        raise InputError(f"{file}: {module}: {error}") from error
    names = {name: name_in_file(module, name) for name in form.tensors}
    return KernelAdapter(method, {n: stored[tensor] for n, tensor in names.items() if tensor in stored}, k, d)


def _method(config: AdapterConfig, module: str, given: Mapping[str, Any]) -> Method:
    """Returns the method of a module's adapter: what the file states, and given fields beside it."""
    fields = stated(config.of(module))
    for key, value in given.items():
        value = tuple(value) if isinstance(value, list) else value
        if key in fields and fields[key] != value:
            raise InputError(f"method.{key} is {value}, and the adapter in the file has {fields[key]}")
    dropout = {"dropout": config.lora_dropout} if "dropout" in flat_fields(METHODS[fields["name"]]) else {}
    return from_json({**fields, **dropout, **given})


def _is_linear(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and name != EMBEDDING


def _check_tied_head(stored: Mapping[str, Stored], folder: epath.Path) -> None:
    """Raises InputError unless a file that trains a tied embedding holds the head as well, and the same."""
    both = stored.get(EMBEDDING), stored.get(HEAD)
    if both[0] is None or both[1] is None or not both[0].equals(both[1]):
        raise InputError(
            f"{folder}: the base ties its head to embed_tokens, and the file trains only one, or both apart, "
            f"which unties them; PEFT keeps them tied with ensure_weight_tying"
        )
