"""config.json of a Hugging Face folder, read and written."""

import dataclasses
from collections.abc import Mapping
from typing import Any, get_type_hints

from etils import epath

from mora_jax.errors import InputError
from mora_jax.io import path_of, read_object
from mora_jax.models.llama import LlamaConfig

CONFIG = "config.json"

# Fields beside those of LlamaConfig, and the values that describe the model that we compute.
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


def read_config(path: epath.PathLike) -> LlamaConfig:
    """Returns the config of a Hugging Face folder.

    Raises:
      InputError: if config.json is missing, damaged, or describes anything but a plain LLaMA.
    """
    file = path_of(path) / CONFIG
    content = read_object(file)
    for name, allowed in _ALLOWED.items():
        if content.get(name) not in allowed:
            raise InputError(f"{file}: {name} is {content.get(name)!r}; only {allowed[0]!r} is supported")
    for name in _NEEDED:
        if content.get(name) is None:
            raise InputError(f"{file}: {name} is missing")
    values = {f.name: content[f.name] for f in dataclasses.fields(LlamaConfig) if f.name in content}
    if values.get("num_key_value_heads") is None:  # written before grouped-query attention
        values["num_key_value_heads"] = content["num_attention_heads"]
    try:
        config = LlamaConfig(**_typed(values | _rope_theta(content, file)))
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    if content.get("head_dim") not in (None, config.head_dim):
        raise InputError(
            f"{file}: head_dim is {content['head_dim']}; "
            f"only hidden_size / num_attention_heads = {config.head_dim} is supported"
        )
    return config


def config_json(config: LlamaConfig, dtype: str, special_ids: Mapping[str, int]) -> dict[str, Any]:
    """Returns the content of config.json.

    Args:
      config: the model.
      dtype: the type of the stored weights.
      special_ids: `bos_token_id`, `eos_token_id` and `pad_token_id`, those that the tokenizer has.
    """
    # A missing id would default to 1 or 2 in transformers; null means that there is none.
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
        "torch_dtype": dtype,  # transformers 4
        "dtype": dtype,  # transformers 5
    }


def _typed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values, each of its field's type; an int may stand for a float."""
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
    """Returns rope_theta, or nothing if it is not given. transformers 5 writes it in rope_parameters."""
    found = [content["rope_theta"]] if content.get("rope_theta") is not None else []
    for name in ("rope_scaling", "rope_parameters"):
        given = content.get(name)
        if given is None:
            continue
        if not isinstance(given, dict) or any(
            value != _PLAIN_ROPE.get(key) for key, value in given.items() if key != "rope_theta"
        ):
            raise InputError(f"{file}: {name} is {given}; only rope_type 'default' is supported")
        found += [given["rope_theta"]] if "rope_theta" in given else []
    if any(value != found[0] for value in found[1:]):
        raise InputError(f"{file}: rope_theta is given twice with different values: {found}")
    return {"rope_theta": found[0]} if found else {}
