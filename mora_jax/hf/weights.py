"""The model to and from a Hugging Face folder: config.json and safetensors, by one table of names."""

import contextlib
import dataclasses
import functools
import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_type_hints

import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from mora_jax import sharding
from mora_jax.errors import InputError, some
from mora_jax.hf import safetensors as safetensors_files
from mora_jax.hf.safetensors import INDEX, WEIGHTS, Stored
from mora_jax.models.llama import LlamaConfig, abstract_params
from mora_jax.sharding import Box
from mora_jax.trees import flatten, unflatten


class Name(NamedTuple):
    """One parameter under both names.

    Attributes:
      path: in our tree.
      tensor: in Hugging Face's files; {} stands for the layer, which is our leading axis.
      transpose: whether theirs is (out, in) where ours is (in, out).
    """

    path: str
    tensor: str
    transpose: bool


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

NAMES = (
    Name("embed_tokens/embedding", EMBEDDING, False),
    Name("layers/input_layernorm/scale", "model.layers.{}.input_layernorm.weight", False),
    Name("layers/self_attn/q_proj/kernel", "model.layers.{}.self_attn.q_proj.weight", True),
    Name("layers/self_attn/k_proj/kernel", "model.layers.{}.self_attn.k_proj.weight", True),
    Name("layers/self_attn/v_proj/kernel", "model.layers.{}.self_attn.v_proj.weight", True),
    Name("layers/self_attn/o_proj/kernel", "model.layers.{}.self_attn.o_proj.weight", True),
    Name("layers/post_attention_layernorm/scale", "model.layers.{}.post_attention_layernorm.weight", False),
    Name("layers/mlp/gate_proj/kernel", "model.layers.{}.mlp.gate_proj.weight", True),
    Name("layers/mlp/up_proj/kernel", "model.layers.{}.mlp.up_proj.weight", True),
    Name("layers/mlp/down_proj/kernel", "model.layers.{}.mlp.down_proj.weight", True),
    Name("norm/scale", "model.norm.weight", False),
    Name("lm_head/kernel", HEAD, True),
)

CONFIG = "config.json"

# What a config may say beside our own fields, where another value would be another model.
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "architectures": (["LlamaForCausalLM"], None),
    "hidden_act": ("silu", "swish", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
}
_PLAIN_ROPE = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}
_NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# A table of rotary frequencies that old exports carry and that the config determines.
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")

Params = Mapping[str, Any]
Shapes = dict[str, tuple[int, ...]]


def save_hf(
    path: epath.PathLike,
    params: Params,
    config: LlamaConfig,
    dtype: Literal["float32", "bfloat16"] = "float32",
    special_ids: Mapping[str, int] | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a folder that `transformers.LlamaForCausalLM.from_pretrained` reads.

    The folder takes its name only when it is whole. Arrays may be divided over the devices of this process:
    one layer of one of them is brought together at a time. In a job of several processes one process calls
    this, with arrays that it holds entirely.

    Args:
      path: the folder to make; local or any place that `etils.epath` knows.
      params: parameters as `Llama(config).init` makes them, layers stacked.
      config: the model.
      dtype: type of the stored weights.
      special_ids: `bos_token_id`, `eos_token_id`, `pad_token_id`, where the tokenizer has them.
      max_shard_bytes: weights above this size are written as several files with an index.

    Raises:
      InputError: where `path` holds something already, or `params` are not those of `config`.
    """
    flat = flatten(params)
    _compare({name: leaf.shape for name, leaf in flat.items()}, _shapes(config), "the parameters")
    with whole_folder(path) as folder:
        _write_weights(folder, flat, config, jnp.dtype(dtype), max_shard_bytes)
        _write_json(folder / CONFIG, _config_to_json(config, dtype, special_ids or {}))


def load_hf(path: epath.PathLike, mesh: Mesh | None = None) -> tuple[dict[str, Any], LlamaConfig]:
    """The parameters (float32, layers stacked) and the config of a Hugging Face LLaMA folder.

    Args:
      path: a folder with config.json and safetensors (float32, bfloat16 or float16; one file or several).
      mesh: the devices to divide the parameters over, by the rules of `sharding`. This process holds, beside
        what its devices get of one parameter at a time, one tensor of one layer. Without a mesh the
        parameters are numpy arrays.

    Raises:
      InputError: for a folder that is incomplete or damaged, a model that is not a plain LLaMA, and tensors
        that are missing, unexpected or of another shape. Each is named.
    """
    folder = epath.Path(path)
    config = read_config(folder)
    places, stored = _places(config), safetensors_files.read_headers(folder)
    _check_stored(stored, places, config, folder)  # before any memory is taken for the weights
    sources: dict[str, list[tuple[_Place, Stored]]] = {}
    for name, place in places.items():
        sources.setdefault(place.path, []).append((place, stored[name]))
    flat = {}
    for name, shape in _shapes(config).items():
        fill = functools.partial(_fill, sources[name])
        if mesh is None:
            fill({tuple((0, n) for n in shape): (whole := np.empty(shape, np.float32))})
            flat[name] = whole
        else:
            flat[name] = sharding.assembled(name, shape, mesh, fill)
    return unflatten(flat), config


def read_config(path: epath.PathLike) -> LlamaConfig:
    """The config of a Hugging Face LLaMA folder. Raises InputError for what is not a plain LLaMA."""
    file = epath.Path(path) / CONFIG
    return _config_from_json(safetensors_files.read_object(file), file)


@contextlib.contextmanager
def whole_folder(path: epath.PathLike) -> Iterator[epath.Path]:
    """A folder to fill under a temporary name; it takes the name `path` when the block ends without error.

    One in a bucket, which renames nothing, is filled in a temporary folder here and copied: config.json,
    which makes it a model, comes last.

    Raises:
      InputError: if `path` is there already and is not an empty folder.
    """
    target = epath.Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} exists already; choose another name or remove it")
    if "://" in str(target):
        with tempfile.TemporaryDirectory() as local:
            folder = epath.Path(local) / target.name  # what is begun beside it goes with it
            folder.mkdir()
            yield folder
            _copy(folder, target)
        return
    partial = target.parent / f"{target.name}.partial"
    partial.rmtree(missing_ok=True)
    partial.mkdir(parents=True)
    yield partial
    if target.exists():
        target.rmdir()
    partial.rename(target)


class _Place(NamedTuple):
    """Where a tensor lies in our tree, and its shape in the file."""

    path: str
    index: tuple[int, ...]
    transpose: bool
    shape: tuple[int, ...]


@functools.lru_cache(maxsize=8)
def _shapes(config: LlamaConfig) -> Shapes:
    """The shape of every parameter, by path."""
    return {path: leaf.shape for path, leaf in flatten(abstract_params(config)).items()}


def _places(config: LlamaConfig) -> dict[str, _Place]:
    """Every tensor of the model in the file's order."""
    shapes = _shapes(config)
    places = {}
    for path, tensor, transpose in NAMES:
        if path not in shapes:  # a tied head
            continue
        stacked = "{}" in tensor
        shape = shapes[path][1:] if stacked else shapes[path]
        shape = shape[::-1] if transpose else shape
        for layer in range(config.num_hidden_layers) if stacked else [None]:
            index = () if layer is None else (layer,)
            places[tensor.format(layer)] = _Place(path, index, transpose, shape)
    return places


def _compare(found: Shapes, expected: Shapes, what: str) -> None:
    missing, unexpected = expected.keys() - found.keys(), found.keys() - expected.keys()
    wrong = [
        f"{name} {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    faults = {"missing": sorted(missing), "unexpected": sorted(unexpected), "of another shape": wrong}
    told = "; ".join(f"{fault}: {some(names)}" for fault, names in faults.items() if names)
    if told:
        raise InputError(f"{what} do not fit the config: {told}")


# Writing


def _write_weights(
    folder: epath.Path, flat: Mapping[str, Any], config: LlamaConfig, dtype: np.dtype, limit: int
) -> None:
    places = _places(config)
    sizes = {name: int(np.prod(place.shape)) * dtype.itemsize for name, place in places.items()}
    shards = _shards(sizes, limit)
    files = {}
    for i, names in enumerate(shards, start=1):
        file = WEIGHTS if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        shapes = {name: places[name].shape for name in names}
        tensors = (_tensor(flat, places[name]) for name in names)
        safetensors_files.write_tensors(folder / file, shapes, dtype, tensors)
        files.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files})


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, in groups that keep to the limit where no single one exceeds it."""
    shards: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def _tensor(flat: Mapping[str, Any], place: _Place) -> np.ndarray:
    ours = np.asarray(flat[place.path][place.index])
    return ours.T if place.transpose else ours


def _config_to_json(config: LlamaConfig, dtype: str, special_ids: Mapping[str, int]) -> dict[str, Any]:
    # Versions 4 and 5 of transformers both read rope_theta here, and both names of the type.
    # An id that the tokenizer lacks is written as null: absent, it would default to 1 or 2.
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")) | dict(special_ids)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **dataclasses.asdict(config),
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        **ids,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def _copy(folder: epath.Path, target: epath.Path) -> None:
    """Copies the files of a folder, a piece at a time."""
    for file in sorted(folder.iterdir(), key=lambda file: file.name == CONFIG):
        with file.open("rb") as source, (target / file.name).open("wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 24)


def _write_json(file: epath.Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")


# Reading


def _config_from_json(content: Mapping[str, Any], file: epath.Path) -> LlamaConfig:
    for name, allowed in _ALLOWED.items():
        if content.get(name) not in allowed:
            raise InputError(f"{file}: {name} {content.get(name)!r} is not supported, only {allowed[0]!r}")
    for name in _NEEDED:
        if content.get(name) is None:
            raise InputError(f"{file}: {name} is missing")
    values = {f.name: content[f.name] for f in dataclasses.fields(LlamaConfig) if f.name in content}
    if values.get("num_key_value_heads") is None:  # as in files from before grouped-query attention
        values["num_key_value_heads"] = content["num_attention_heads"]
    try:
        config = LlamaConfig(**_typed(values | _rope_theta(content, file)))
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    if content.get("head_dim") not in (None, config.head_dim):
        raise InputError(
            f"{file}: head_dim {content['head_dim']} is not supported; "
            f"it must be hidden_size / num_attention_heads = {config.head_dim}"
        )
    return config


def _typed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values in the types of LlamaConfig's fields; a whole number may stand for a float."""
    types = get_type_hints(LlamaConfig)
    typed = {
        n: float(v) if types[n] is float and type(v) is int and abs(v) < 2**63 else v
        for n, v in values.items()
    }
    for name, value in typed.items():
        if type(value) is not types[name]:
            raise InputError(f"{name} must be of type {types[name].__name__}, not {value!r}")
    return typed


def _rope_theta(content: Mapping[str, Any], file: epath.Path) -> dict[str, Any]:
    """rope_theta, which version 5 of transformers writes inside rope_parameters; empty where not given."""
    found = [content["rope_theta"]] if content.get("rope_theta") is not None else []
    for name in ("rope_scaling", "rope_parameters"):
        given = content.get(name)
        if given is None:
            continue
        if not _is_plain(given):
            raise InputError(f"{file}: {name} {given} is not supported, only rope_type 'default'")
        found += [given["rope_theta"]] if "rope_theta" in given else []
    if any(value != found[0] for value in found[1:]):
        raise InputError(f"{file}: rope_theta is given twice, with different values")
    return {"rope_theta": found[0]} if found else {}


def _is_plain(rope: Any) -> bool:
    return isinstance(rope, dict) and all(
        value == _PLAIN_ROPE.get(key) for key, value in rope.items() if key != "rope_theta"
    )


def _check_stored(
    stored: Mapping[str, Stored], places: Mapping[str, _Place], config: LlamaConfig, folder: epath.Path
) -> None:
    """Raises InputError unless the files hold the model's tensors, and else only what it implies."""
    found = {name: tensor.shape for name, tensor in stored.items()}
    for name in [name for name in found if _DERIVED.fullmatch(name)]:
        if math.prod(found.pop(name)) > config.hidden_size:
            raise InputError(f"{folder}: {name} is larger than a table of rotary frequencies")
    expected = {name: place.shape for name, place in places.items()}
    doubled = config.tie_word_embeddings and HEAD in found
    if doubled:
        expected[HEAD] = expected[EMBEDDING]
    _compare(found, expected, f"the weights in {folder}")
    if doubled and not _equal(stored[HEAD], stored[EMBEDDING]):
        raise InputError(f"tie_word_embeddings is true, but {HEAD} differs from the embedding")


def _equal(a: Stored, b: Stored, rows: int = 4096) -> bool:
    """Whether two tensors of one shape hold the same numbers, looked at some rows at a time."""
    ends = [(start, min(start + rows, a.shape[0])) for start in range(0, a.shape[0], rows)]
    return all(np.array_equal(a.rows(*end), b.rows(*end)) for end in ends)


def _fill(sources: Sequence[tuple[_Place, Stored]], parts: Mapping[Box, np.ndarray]) -> None:
    """Reads parts of one parameter, rows that several of them need only once.

    Args:
      sources: its tensors, one a layer where layers are stacked.
      parts: buffers to fill, by the first and the last index, exclusive, of each axis of the parameter.
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
