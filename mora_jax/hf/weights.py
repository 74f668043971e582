"""A model's parameters, read from and written to a Hugging Face folder."""

import concurrent.futures
import functools
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array

from mora_jax import sharding
from mora_jax.errors import InputError
from mora_jax.hf import safetensors
from mora_jax.hf.config import CONFIG, config_json, read_config
from mora_jax.hf.folder import whole_folder
from mora_jax.hf.hub import local_folder
from mora_jax.hf.names import EMBEDDING, HEAD, Place, compare_shapes, parameter_shapes, places
from mora_jax.hf.safetensors import Stored
from mora_jax.io import path_of
from mora_jax.models.llama import LAYOUTS, LlamaConfig, abstract_params
from mora_jax.on import On
from mora_jax.sharding import Box
from mora_jax.transform import Methods, Tree, adapters_of, effective
from mora_jax.trees import flatten, unflatten

MAX_SHARD_BYTES = 5 * 10**9
_HASHERS = 4
# Tables of rotary frequencies in old exports, which the config determines.
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def save_hf(
    path: epath.PathLike,
    params: Mapping[str, Any],
    config: LlamaConfig,
    dtype: Literal["float32", "bfloat16"] = "float32",
    special_ids: Mapping[str, int] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    adapters: Tree | None = None,
    methods: Methods = Methods(()),  # noqa: B008 (immutable)
) -> None:
    """Writes a folder that `AutoModelForCausalLM.from_pretrained` of transformers reads.

    The folder appears under its name only when it is complete. Arrays may be sharded over the devices of this
    process; one layer of one array is copied to the host at a time. In a job of several processes one process
    calls this, with arrays that it holds entirely.

    Args:
      path: the folder to make; local, or any place that `etils.epath` knows.
      params: parameters as `Llama(config).init` makes them, layers stacked.
      config: the model.
      dtype: type of the stored weights.
      special_ids: `bos_token_id`, `eos_token_id` and `pad_token_id`, those that the tokenizer has.
      max_shard_bytes: weights above this size are split into several files with an index.
      adapters: adapters that are merged into what is written, in float32 and one layer at a time.
      methods: what the adapters mean.

    Raises:
      InputError: if `path` exists and is not an empty folder, or `params` do not fit `config` or hold NaN or
        infinity. Nothing is left behind.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp
      >>> from mora_jax import Llama, LlamaConfig, load_hf, save_hf
      >>> config = LlamaConfig(32, 8, 16, 1, 2, 2)
      >>> params = Llama(config).init(jax.random.key(0), jnp.ones((1, 4), jnp.int32))["params"]
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_hf(f"{folder}/model", params, config)
      ...     bool(jnp.all(load_hf(f"{folder}/model")[0]["norm"]["scale"] == params["norm"]["scale"]))
      True
    """
    flat = flatten(params)
    compare_shapes(
        {name: leaf.shape for name, leaf in flat.items()},
        parameter_shapes(config),
        "the parameters do not fit the config",
    )
    found = {path: (on, arrays) for path, on, arrays in adapters_of(params, adapters or {}, methods)}
    with whole_folder(path) as folder:
        known = places(config)
        specs = {n: jax.ShapeDtypeStruct(place.shape, jnp.dtype(dtype)) for n, place in known.items()}
        write_weights(folder, specs, lambda name: _tensor(flat, found, known[name]), max_shard_bytes)
        write_json(folder / CONFIG, config_json(config, dtype, special_ids or {}))


def load_hf(
    path: epath.PathLike, mesh: Mesh | None = None, types: Mapping[str, DTypeLike] | None = None
) -> tuple[dict[str, Any], LlamaConfig]:
    """Reads the parameters and the config of a Hugging Face LLaMA folder.

    Args:
      path: a folder with config.json and safetensors (float32, bfloat16 or float16; one file or several), or
        the id of a model on the Hub, `org/name` or `org/name@revision`.
      mesh: the devices to shard the parameters over, by the rules of `sharding`. The host holds one tensor of
        one layer, and of one parameter at a time what this process's devices keep. Without a mesh the
        parameters are numpy arrays.
      types: types of parameters by path; float32 for all others.

    Returns:
      The parameters, layers stacked, and the config.

    Raises:
      InputError: if the folder is incomplete or damaged, the config has what is not computed, or tensors are
        missing, unexpected or of another shape. The message names them.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp
      >>> from mora_jax import Llama, LlamaConfig, load_hf, save_hf
      >>> config = LlamaConfig(32, 8, 16, 1, 2, 2)
      >>> params = Llama(config).init(jax.random.key(0), jnp.ones((1, 4), jnp.int32))["params"]
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_hf(f"{folder}/model", params, config)
      ...     load_hf(f"{folder}/model")[1] == config
      True
    """
    folder = local_folder(path)
    config = read_config(folder)
    stored = read_weights(folder, config)
    sources: dict[str, list[tuple[Place, Stored]]] = {}
    for name, place in places(config).items():
        sources.setdefault(place.path, []).append((place, stored[name]))
    shardings = sharding.shardings(abstract_params(config), mesh, LAYOUTS) if mesh else {}
    flat, lies = {}, flatten(shardings)
    for name, shape in parameter_shapes(config).items():
        fill, dtype = functools.partial(_fill, sources[name]), jnp.dtype((types or {}).get(name, np.float32))
        if mesh is None:
            fill({tuple((0, n) for n in shape): (array := np.empty(shape, dtype))})
            flat[name] = array
        else:
            flat[name] = sharding.assembled(lies[name], shape, fill, dtype)
    return unflatten(flat), config


def read_weights(path: epath.PathLike, config: LlamaConfig) -> dict[str, Stored]:
    """Returns the tensors of a model by name, in the order of `places`. Reads the headers of its files only.

    Raises:
      InputError: unless the files hold the model's tensors, and beside them only what the config implies.
    """
    folder, tensors = path_of(path), places(config)
    stored = safetensors.read_headers(folder)
    _check_stored(stored, tensors, config, folder)
    return {name: stored[name] for name in tensors}


def stored_types(path: epath.PathLike) -> dict[str, np.dtype]:
    """Returns a type for each parameter of a model in a folder, by path, that holds it without rounding.

    It is bfloat16 where the files have that, and float32 otherwise.
    """
    config, bfloat16 = read_config(path_of(path)), jnp.dtype(jnp.bfloat16)
    stored, types = read_weights(path, config), {}
    for name, place in places(config).items():
        narrow = stored[name].dtype == bfloat16 == types.get(place.path, bfloat16)
        types[place.path] = bfloat16 if narrow else jnp.dtype(jnp.float32)
    return types


def fingerprint(stored: Mapping[str, Stored]) -> str:
    """Returns a hash of a model: of the names, shapes and numbers of its tensors. Reads all of them.

    The numbers are hashed as float32, so a copy in a wider type is the same model.

    Args:
      stored: the tensors, as `read_weights` returns them.
    """
    digest = hashlib.sha256()
    with concurrent.futures.ThreadPoolExecutor(_HASHERS) as pool:
        for (name, tensor), found in zip(stored.items(), pool.map(_hash, stored.values()), strict=True):
            digest.update(f"{name} {list(tensor.shape)} {found}\n".encode())
    return digest.hexdigest()


def _hash(tensor: Stored, numbers: int = 1 << 22) -> str:
    """Returns a hash of a tensor's numbers, of which so many are held at a time, or one row."""
    digest, rows = hashlib.sha256(), max(1, numbers * tensor.shape[0] // max(math.prod(tensor.shape), 1))
    for start in range(0, tensor.shape[0], rows):
        read = tensor.rows(start, min(start + rows, tensor.shape[0]))
        digest.update(read.astype("<f4").tobytes())
    return digest.hexdigest()


# Writing


def write_weights(
    folder: epath.Path,
    specs: Mapping[str, jax.ShapeDtypeStruct],
    value: Callable[[str], np.ndarray],
    limit: int = MAX_SHARD_BYTES,
) -> None:
    """Writes tensors to one file, or to several with an index; the host holds one tensor at a time.

    Args:
      folder: where the files are written.
      specs: shape and type of every tensor, by name, in the order of the files.
      value: returns the value of a tensor.
      limit: bytes of a file of more than one tensor.
    """
    sizes = {name: math.prod(spec.shape) * spec.dtype.itemsize for name, spec in specs.items()}
    shards = _shards(sizes, limit)
    files = {}
    for i, names in enumerate(shards, start=1):
        file = safetensors.WEIGHTS if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        values = (finite(name, value(name), specs[name].dtype) for name in names)
        safetensors.write_tensors(folder / file, {name: specs[name] for name in names}, values)
        files.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files}
        write_json(folder / safetensors.INDEX, index)


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Groups names, in order, so that a group of more than one name takes at most `limit` bytes."""
    shards: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def _tensor(
    flat: Mapping[str, Any], adapted: Mapping[str, tuple[On, Mapping[str, Any]]], place: Place
) -> np.ndarray:
    """Returns a tensor: a parameter, or one layer of it, with its adapter."""
    array = flat[place.path]
    if place.path in adapted:
        array = _adapted(*adapted[place.path], array, place.index)
    else:
        array = array[place.index]
    array = np.asarray(array)
    return array.T if place.transpose else array


def _adapted(on: On, arrays: Mapping[str, Any], w: Any, index: tuple[int, ...]) -> Array:
    """Returns a kernel, or one layer of it, with its adapter, in float32."""
    axes, merge = on.axes(w.shape), jax.jit(effective, static_argnums=0)
    if index and axes.stack[:1] == (0,):
        # The layers' axis comes first, and is gone in one layer.
        inputs, stack = (tuple(axis - 1 for axis in of) for of in (axes.inputs, axes.stack[1:]))
        return merge(On(on.method, inputs, stack), {n: a[index] for n, a in arrays.items()}, w[index])
    return merge(on, dict(arrays), w)[index]


def finite(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns a tensor as it is stored. Raises InputError if it holds NaN or infinity, which no model has."""
    stored = np.ascontiguousarray(array, dtype)
    if not np.isfinite(stored).all():
        raise InputError(f"{name} holds NaN or infinity, so no model is written; the weights are of no use")
    return stored


def write_json(file: epath.Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object with two spaces of indentation."""
    file.write_text(json.dumps(content, indent=2) + "\n")


# Reading


def _check_stored(
    stored: Mapping[str, Stored], tensors: Mapping[str, Place], config: LlamaConfig, folder: epath.Path
) -> None:
    """Raises InputError unless the files hold the model's tensors, and beside them only what it implies."""
    found = {name: tensor.shape for name, tensor in stored.items()}
    for name in [name for name in found if _DERIVED.fullmatch(name)]:
        if math.prod(found.pop(name)) > config.hidden_size:
            raise InputError(f"{folder}: {name} is too large for a table of rotary frequencies")
    expected = {name: place.shape for name, place in tensors.items()}
    head_stored = config.tie_word_embeddings and HEAD in found
    if head_stored:
        expected[HEAD] = expected[EMBEDDING]
    compare_shapes(found, expected, f"the weights in {folder} do not fit the config")
    if head_stored and not stored[HEAD].equals(stored[EMBEDDING]):
        raise InputError(
            f"{folder}: {HEAD} differs from {EMBEDDING}, though tie_word_embeddings is true; "
            f"remove the tensor or set tie_word_embeddings to false in {CONFIG}"
        )


def _fill(sources: Sequence[tuple[Place, Stored]], parts: Mapping[Box, np.ndarray]) -> None:
    """Reads parts of one parameter. Rows that several parts need are read once.

    Args:
      sources: the parameter's tensors, one a layer if layers are stacked.
      parts: the buffers to fill, by their boxes within the parameter.
    """
    for place, tensor in sources:
        by_rows: dict[Any, list[tuple[Any, np.ndarray]]] = {}
        for box, part in parts.items():
            rows, *columns = box[len(place.index) :][:: -1 if place.transpose else 1]
            by_rows.setdefault(rows, []).append((columns, part[place.index]))
        for rows, wanted in by_rows.items():
            read = tensor.rows(*rows)
            for columns, part in wanted:
                cut = read[:, slice(*columns[0])] if columns else read
                part[...] = cut.T if place.transpose else cut
