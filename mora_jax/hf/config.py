"""config.json of a Hugging Face folder, read and written."""

from collections.abc import Mapping
from typing import Any, NamedTuple, get_type_hints

from etils import epath

from mora_jax.errors import InputError, nearest
from mora_jax.hf.formats import FORMATS, NO_EFFECT, ONLY, Format
from mora_jax.io import path_of, read_object
from mora_jax.models.config import ARCHITECTURES, LlamaConfig
from mora_jax.models.rope import FIELDS, Rope

CONFIG = "config.json"

_NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# Fields that each architecture has, named as in `LlamaConfig`.
_COMMON = (
    *_NEEDED,
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "initializer_range",
    "tie_word_embeddings",
    "model_type",
    "head_dim",
)
# What null means there.
_NULL = {"head_dim": 0, "attention_bias": False, "mlp_bias": False}
_ROPE = ("rope_theta", "rope_scaling", "rope_parameters")


def read_config(path: epath.PathLike) -> LlamaConfig:
    """Returns the config of a Hugging Face folder.

    Raises:
      InputError: if config.json is missing or damaged, describes a model of another architecture, or has a
        field that is not known or whose value is not computed.
    """
    folder = path_of(path)
    file = folder / CONFIG
    if not file.exists() and not folder.is_dir():
        raise InputError(f"{path} is {'a file, not the folder of a model' if folder.exists() else 'missing'}")
    if not file.exists() and (folder / "adapter_config.json").exists():
        raise InputError(f"{path} is an adapter; merge it into its base first: mora merge BASE {path} OUT")
    content = read_object(file)
    try:
        return _config(content)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def config_json(config: LlamaConfig, dtype: str, special_ids: Mapping[str, int]) -> dict[str, Any]:
    """Returns the content of config.json.

    Args:
      config: the model.
      dtype: the type of the stored weights.
      special_ids: `bos_token_id`, `eos_token_id` and `pad_token_id`, those that the tokenizer has.
    """
    # A missing id would default to 1 or 2 in transformers; null means that there is none.
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")) | dict(special_ids)
    fields = {name: getattr(config, name) for name in (*_COMMON, *config.architecture.options)}
    return {
        "architectures": [FORMATS[config.model_type].model_class],
        **fields,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        **_rope_json(config),
        **_window_json(config),
        **ids,
        "torch_dtype": dtype,  # transformers 4
        "dtype": dtype,  # transformers 5
    }


def _config(content: Mapping[str, Any]) -> LlamaConfig:
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in FORMATS:
        raise InputError(f"model_type is {kind!r}; supported are {', '.join(FORMATS)}")
    form, names = FORMATS[kind], [*_COMMON, *ARCHITECTURES[kind].options]
    _check_fields(content, form, (*names, *_ROPE, *form.window_fields))
    for name in _NEEDED:
        if content.get(name) is None:
            raise InputError(f"{name} is missing")
    null = {**_NULL, "num_key_value_heads": content["num_attention_heads"]}
    plain = [name for name in names if name in content and name != "sliding_window"]
    given = {n: null[n] if content[n] is None and n in null else content[n] for n in plain}
    # Files that were written before grouped-query attention lack num_key_value_heads.
    defaults = {"num_key_value_heads": content["num_attention_heads"], **form.defaults}
    typed = _typed(LlamaConfig, defaults | given | _theta(content))
    typed |= _window(content, form, typed["num_hidden_layers"])
    context = typed.get("max_position_embeddings", LlamaConfig.max_position_embeddings)
    return LlamaConfig(**typed, rope=_rope(content, context))


def _check_fields(content: Mapping[str, Any], form: Format, understood: tuple[str, ...]) -> None:
    """Raises InputError for a field that is not known, or has a value that is not computed."""
    only = ONLY | {"architectures": ([form.model_class], None)}
    for name, value in content.items():
        if name in understood or name in NO_EFFECT:
            continue
        if name not in only:
            hint = nearest(name, understood)
            raise InputError(f"{name} is {value!r}, a field that is not known and may change the model{hint}")
        if value not in only[name]:
            raise InputError(f"{name} is {value!r}; only {only[name][0]!r} is supported")


def _typed(cls: type, values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns values for the fields of a class, each of its field's type; an int may stand for a float."""
    types = get_type_hints(cls)
    typed = {
        n: float(v) if types[n] is float and type(v) is int and abs(v) < 2**63 else v
        for n, v in values.items()
    }
    for name, value in typed.items():
        kind = types[name] if isinstance(types[name], type) else str  # a choice of words
        if type(value) is not kind:
            raise InputError(f"{prefix}{name} must be of type {kind.__name__}, not {value!r}")
    return typed


# Sliding windows


class _Windows(NamedTuple):
    """Which layers have a window, with the defaults of the format."""

    use_sliding_window: bool = False
    sliding_window: int = 4096
    max_window_layers: int = 28


def _window(content: Mapping[str, Any], form: Format, layers: int) -> dict[str, int]:
    """Returns sliding_window, or nothing for an architecture without windows.

    Args:
      content: of the file.
      form: of the architecture.
      layers: layers of the model.

    Raises:
      InputError: if some layers have a window and others none.
    """
    if "sliding_window" not in ARCHITECTURES[content["model_type"]].options:
        return {}
    given = {name: content[name] for name in _Windows._fields if content.get(name) is not None}
    if "sliding_window" in content:
        given.setdefault("sliding_window", 0)  # null
    windows = _Windows(**_typed(_Windows, given))
    if not form.window_fields:
        return {"sliding_window": windows.sliding_window}
    window = windows.sliding_window if windows.use_sliding_window else 0
    if (kinds := content.get("layer_types")) is not None:
        one = kinds[0] if isinstance(kinds, list) and kinds else None
        if one not in ("full_attention", "sliding_attention") or kinds != [one] * layers:
            raise InputError(f"layer_types is {kinds!r}; only one type in all {layers} layers is supported")
        if one == "sliding_attention" and not window:
            raise InputError(
                "layer_types has sliding_attention, which needs use_sliding_window and sliding_window"
            )
        return {"sliding_window": window if one == "sliding_attention" else 0}
    if window and 0 < windows.max_window_layers < layers:
        raise InputError(
            f"max_window_layers is {windows.max_window_layers}: of {layers} layers some have a window; "
            "only windows in all layers, or in none, are supported"
        )
    return {"sliding_window": window if windows.max_window_layers <= 0 else 0}


def _window_json(config: LlamaConfig) -> dict[str, Any]:
    if "sliding_window" not in config.architecture.options:
        return {}
    written: dict[str, Any] = {"sliding_window": config.sliding_window or None}
    if FORMATS[config.model_type].window_fields:
        first = 0 if config.sliding_window else config.num_hidden_layers
        written |= {"use_sliding_window": bool(config.sliding_window), "max_window_layers": first}
    return written


# Rotary positions: transformers 4 has rope_theta and rope_scaling, transformers 5 rope_parameters with both


def _theta(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns rope_theta, or nothing if it is not given. Raises InputError if it is given differently."""
    places = (content, *(content.get(name) for name in _ROPE[1:]))
    found = [place["rope_theta"] for place in places if isinstance(place, dict) and "rope_theta" in place]
    found = [value for value in found if value is not None]
    if any(value != found[0] for value in found):
        raise InputError(f"rope_theta is given twice with different values: {found}")
    return {"rope_theta": found[0]} if found else {}


def _rope(content: Mapping[str, Any], context: int) -> Rope:
    """Returns the scaling of the rotary positions, in the older or the newer spelling.

    Args:
      content: of the file.
      context: max_position_embeddings.

    Raises:
      InputError: if both spellings are given and differ, or one has a field that its type does not take.
    """
    found = [
        _scaling(name, content[name], context) for name in _ROPE[1:] if content.get(name) not in (None, {})
    ]
    if any(rope != found[0] for rope in found):
        raise InputError("rope_scaling and rope_parameters differ")
    return found[0] if found else Rope()


def _scaling(place: str, given: Any, context: int) -> Rope:
    if not isinstance(given, dict):
        raise InputError(f"{place} is {given!r}, not an object")
    rest = {name: value for name, value in given.items() if value is not None and name != "rope_theta"}
    kinds = [rest.pop(name) for name in ("rope_type", "type") if name in rest] or ["default"]
    if kinds[0] not in tuple(FIELDS) or kinds[0] != kinds[-1]:
        shown = " and ".join(map(repr, kinds))
        raise InputError(f"{place}: rope_type is {shown}; supported are {', '.join(FIELDS)}")
    kind, takes = kinds[0], FIELDS[kinds[0]]
    if rest.pop("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(f"{place}: partial_rotary_factor is {given['partial_rotary_factor']!r}, not 1.0")
    for name in rest:
        if name not in takes:
            raise InputError(f"{place}: {name} is {given[name]!r}, no field of rope_type {kind!r}")
    if "original_max_position_embeddings" in takes:
        rest.setdefault("original_max_position_embeddings", context)
        rest = _typed(Rope, rest, f"{place}: ")
    if kind == "yarn":
        rest.setdefault("factor", context / max(rest["original_max_position_embeddings"], 1))
    for name in ("factor", "low_freq_factor", "high_freq_factor"):
        if name in takes and name not in rest:
            raise InputError(f"{place}: {name} is missing")
    if rest.get("attention_factor") == 0:
        raise InputError(f"{place}: attention_factor is 0; leave it out to derive it from factor")
    return Rope(kind, **_typed(Rope, rest, f"{place}: "))


def _rope_json(config: LlamaConfig) -> dict[str, Any]:
    """Returns the older spelling, which both versions of transformers read."""
    written: dict[str, Any] = {"rope_theta": config.rope_theta}
    if config.rope.type != "default":
        derived = ("attention_factor", "mscale", "mscale_all_dim")
        values = {name: getattr(config.rope, name) for name in FIELDS[config.rope.type]}
        values = {name: value for name, value in values.items() if value or name not in derived}
        written["rope_scaling"] = {"rope_type": config.rope.type, **values}
    return written
