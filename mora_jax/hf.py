"""The model to and from a Hugging Face folder: config.json and safetensors, by one table of names."""

import contextlib
import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from mora_jax import safetensors_files
from mora_jax.errors import InputError
from mora_jax.llama import Compute, Llama, LlamaConfig
from mora_jax.safetensors_files import INDEX, WEIGHTS, Shapes, some
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


NAMES = (
    Name("embed_tokens/embedding", "model.embed_tokens.weight", False),
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
    Name("lm_head/kernel", "lm_head.weight", True),
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

HEAD = "lm_head.weight"

Params = Mapping[str, Any]


def save_hf(
    path: epath.PathLike,
    params: Params,
    config: LlamaConfig,
    dtype: Literal["float32", "bfloat16"] = "float32",
    special_ids: Mapping[str, int] | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a folder that `transformers.LlamaForCausalLM.from_pretrained` reads.

    The folder takes its name only when it is whole. In a job of several processes one process calls this,
    with arrays that it holds entirely.

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


def load_hf(path: epath.PathLike) -> tuple[dict[str, Any], LlamaConfig]:
    """The parameters (float32 numpy arrays, layers stacked) and the config of a Hugging Face LLaMA folder.

    Args:
      path: a folder with config.json and safetensors (float32, bfloat16 or float16; one file or several).

    Raises:
      InputError: for a folder that is incomplete or damaged, a model that is not a plain LLaMA, and tensors
        that are missing, unexpected or of another shape. Each is named.
    """
    folder = epath.Path(path)
    config = _config_from_json(safetensors_files.read_object(folder / CONFIG), folder / CONFIG)
    places, headers = _places(config), safetensors_files.read_headers(folder)
    _check_headers(headers, places, config, folder)  # before any memory is taken for the weights
    flat = {name: np.empty(shape, np.float32) for name, shape in _shapes(config).items()}
    doubled = []
    for file, header in headers.items():
        for name, tensor in safetensors_files.read_tensors(file, header):
            if name in places:
                place = places[name]
                flat[place.path][place.index] = tensor.T if place.transpose else tensor
            elif name == HEAD:
                doubled.append(tensor)
    if any(not np.array_equal(tensor, flat["embed_tokens/embedding"]) for tensor in doubled):
        raise InputError("tie_word_embeddings is true, but lm_head.weight differs from the embedding")
    return unflatten(flat), config


@contextlib.contextmanager
def whole_folder(path: epath.PathLike) -> Iterator[epath.Path]:
    """A folder to fill under a temporary name; it takes the name `path` when the block ends without error.

    Raises:
      InputError: if `path` is there already and is not an empty folder.
    """
    target = epath.Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} exists already; choose another name or remove it")
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
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    variables = jax.eval_shape(Llama(config, Compute(layers="scan")).init, jax.random.key(0), tokens)
    return {path: leaf.shape for path, leaf in flatten(variables["params"]).items()}


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
        tensors = {name: _tensor(flat, places[name], dtype) for name in names}
        (folder / file).write_bytes(safetensors.numpy.save(tensors, metadata={"format": "pt"}))
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


def _tensor(flat: Mapping[str, Any], place: _Place, dtype: np.dtype) -> np.ndarray:
    ours = np.asarray(flat[place.path][place.index])
    return np.ascontiguousarray(ours.T if place.transpose else ours, dtype)


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


def _check_headers(
    headers: Mapping[epath.Path, Shapes],
    places: Mapping[str, _Place],
    config: LlamaConfig,
    folder: epath.Path,
) -> None:
    """Raises InputError unless the files hold the model's tensors, and else only what it implies."""
    found = {name: shape for header in headers.values() for name, shape in header.items()}
    for name in [name for name in found if _DERIVED.fullmatch(name)]:
        if math.prod(found.pop(name)) > config.hidden_size:
            raise InputError(f"{folder}: {name} is larger than a table of rotary frequencies")
    expected = {name: place.shape for name, place in places.items()}
    if config.tie_word_embeddings and HEAD in found:  # stored twice
        expected[HEAD] = expected["model.embed_tokens.weight"]
    _compare(found, expected, f"the weights in {folder}")
