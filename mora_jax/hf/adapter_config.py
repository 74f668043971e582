"""Folders with adapters, as PEFT and the authors' fork of it write them: config, names and shapes."""

import dataclasses
import functools
import math
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath

from mora_jax.errors import InputError, nearest
from mora_jax.hf.hub import is_hub_id
from mora_jax.io import read_object
from mora_jax.methods import Method
from mora_jax.methods.base import Arrays
from mora_jax.methods.peft import MAGNITUDE, PeftAdapter
from mora_jax.methods.registry import changed

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE_HASH = "base_sha256"  # in the metadata of our files
PREFIX = "base_model.model."  # of the names of tensors

# Fields with an effect that we do not compute, and their values without one.
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_mora": (False, True, None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica"),
}
# Fields that change nothing in a trained adapter. Any other field must be empty.
_IGNORED = (
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "megatron_core",
    "mora_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
    "velora_config",
)
_ALL_LINEAR = "all-linear"


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What adapter_config.json says of an adapter, in its own names.

    Attributes:
      r: rank, unless `rank_pattern` has another. In the authors' files the LoRA rank that M matches.
      lora_alpha: alpha, unless `alpha_pattern` has another.
      target_modules: ends of the adapted modules' names; a regex of them; or "all-linear".
      lora_dropout: share of the adapter's inputs that training sets to zero.
      use_rslora: whether an update is scaled by alpha / sqrt(r) instead of alpha / r.
      use_dora: whether the adapters are DoRA's.
      rank_pattern: ranks by regexes of the ends of modules' names.
      alpha_pattern: alphas likewise.
      modules_to_save: ends of the names of modules that are in the file as a whole.
      mora_type: number of MoRA's operator in the authors' files, which have `use_mora`; else 0.
    """

    r: float
    lora_alpha: float
    target_modules: tuple[str, ...] | str
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    mora_type: int = 0

    def adapts(self, module: str) -> bool:
        """Returns whether a linear layer is adapted, as PEFT decides it."""
        return _adapts(self.target_modules, module)

    def saves(self, module: str) -> bool:
        """Returns whether a module is in the file as a whole, as PEFT decides it."""
        return module.endswith(self.modules_to_save)

    def of(self, module: str) -> PeftAdapter:
        """Returns what is said of an adapted module, without tensors."""
        rank = _by_pattern(self.rank_pattern, module, self.r)
        alpha = _by_pattern(self.alpha_pattern, module, self.lora_alpha)
        return PeftAdapter({}, rank, alpha, self.use_rslora, self.use_dora, self.mora_type)

    def check_modules(self, linear: Collection[str], modules: Collection[str], file: epath.Path) -> None:
        """Raises InputError if a name is that of no module.

        Args:
          linear: the linear layers of the base.
          modules: all its modules.
          file: for the message.
        """
        targets = self.target_modules
        for one in (targets,) if isinstance(targets, str) else [(end,) for end in targets]:
            if not any(_adapts(one, module) for module in linear):
                raise _unknown(file, "target_modules", one if isinstance(one, str) else one[0], linear)
        for name in self.modules_to_save:
            if not any(module.endswith(name) for module in modules):
                raise _unknown(file, "modules_to_save", name, modules)

    def to_json(self, base: str, tied: bool) -> dict[str, Any]:
        """Returns the content of the file, with few fields: old versions of PEFT refuse those of newer ones.

        Args:
          base: folder or Hub id of the base.
          tied: whether the head, which is tied to a trained embedding, is in the file as well.
        """
        fields = {name: _plain(value) for name, value in dataclasses.asdict(self).items()}
        mora = {"use_mora": True, "mora_type": self.mora_type} if self.mora_type else {}
        del fields["mora_type"]
        name, _, revision = base.partition("@") if is_hub_id(base) else (base, "", "")
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": name,
            "revision": revision or None,
            "inference_mode": True,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            **fields,
            "modules_to_save": fields["modules_to_save"] or None,
            **({"ensure_weight_tying": True} if tied else {}),
            **mora,
        }


def read_adapter_config(file: epath.Path) -> AdapterConfig:
    """Returns the config in a file.

    Raises:
      InputError: if it is missing or damaged, a field has a wrong type, or an effect that we do not compute.
    """
    content = read_object(file)
    if content.get("use_mora") and content.get("mora_type") in (None, 0):
        content["mora_type"] = 1  # the fork's default
    for name, value in content.items():
        _check_field(file, name, value, content)
    if "peft_type" not in content:
        raise InputError(f"{file}: peft_type is missing")
    given = {name: content[name] for name in _KINDS if content.get(name) is not None}
    if not content.get("use_mora"):
        given.pop("mora_type", None)
    for name in ("r", "lora_alpha", "target_modules"):
        if name not in given:
            raise InputError(f"{file}: {name} is missing")
    return AdapterConfig(**{name: _typed(file, name, value) for name, value in given.items()})


def module_of(tensor: str) -> str:
    """Returns the module that holds a tensor."""
    return tensor.rpartition(".")[0]


def name_in_file(module: str, name: str) -> str:
    """Returns the name of a module's tensor, such as `lora_A`, in a file, without `PREFIX`."""
    return f"{module}.{name}" if name == MAGNITUDE else f"{module}.{name}.weight"


@functools.partial(jax.jit, static_argnums=(0, 1, 3, 4))
def in_file(method: Method, authors: bool, arrays: Arrays, k: int, d: int) -> PeftAdapter:
    """Returns what a file holds of a (k, d) kernel's adapter.

    Args:
      method: the adapter's method.
      authors: whether the file is one of MoRA's authors, or of PEFT itself.
      arrays: the adapter's arrays.
      k: inputs of the kernel.
      d: its outputs.

    Raises:
      InputError: if such a file cannot hold it.
    """
    found = (method.to_authors if authors else method.to_peft)(arrays, k, d)
    if found is None:
        how = "the files of MoRA's authors" if authors else "a file of LoRA's form"
        fields = changed(method)
        words = ", ".join(f"{name} {value}" for name, value in fields.items() if name != "name")
        raise InputError(
            f"{method.name} ({words}) has no place in {how}: merge it and export the whole model"
        )
    return found


@functools.lru_cache(maxsize=256)
def file_form(method: Method, authors: bool, k: int, d: int) -> PeftAdapter:
    """Returns what `in_file` returns, with shapes in the place of tensors."""
    arrays = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in method.shapes(k, d).items()}
    return jax.eval_shape(lambda a: in_file(method, authors, a, k, d), arrays)


class _Kind(NamedTuple):
    """What a field may hold: a test of it, and words for the test."""

    test: Any
    words: str


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_regex(text: Any) -> bool:
    try:
        return isinstance(text, str) and bool(re.compile(text))
    except re.error:
        return False


_RANK = _Kind(lambda v: _is_number(v) and v > 0, "a number above 0")
_SWITCH = _Kind(lambda v: isinstance(v, bool), "true or false")
_NAMES = _Kind(lambda v: isinstance(v, list) and all(isinstance(n, str) and n for n in v), "a list of names")
_KINDS: dict[str, _Kind] = {
    "r": _RANK,
    "lora_alpha": _Kind(_is_number, "a number"),
    "target_modules": _Kind(lambda v: _NAMES.test(v) or _is_regex(v), "a list of names or a regex"),
    "lora_dropout": _Kind(lambda v: _is_number(v) and 0 <= v < 1, "a number in [0, 1)"),
    "use_rslora": _SWITCH,
    "use_dora": _SWITCH,
    "rank_pattern": _Kind(
        lambda v: isinstance(v, dict) and all(_is_regex(k) and _RANK.test(r) for k, r in v.items()),
        "a mapping of regexes to ranks",
    ),
    "alpha_pattern": _Kind(
        lambda v: isinstance(v, dict) and all(_is_regex(k) and _is_number(a) for k, a in v.items()),
        "a mapping of regexes to numbers",
    ),
    "modules_to_save": _NAMES,
    "mora_type": _Kind(lambda v: type(v) is int, "an integer"),
}


def _check_field(file: epath.Path, name: str, value: Any, content: Mapping[str, Any]) -> None:
    """Raises InputError for a field with an effect that we do not compute, known or not."""
    if name in _ALLOWED:
        if value not in _ALLOWED[name]:
            changed = " (adapters of a changed base are not)" if name == "init_lora_weights" else ""
            raise InputError(f"{file}: {name} is {value!r}; {_ALLOWED[name][0]!r} is supported{changed}")
    elif name not in (*_KINDS, *_IGNORED) and not (value is None or value is False or value in ("", [], {})):
        raise InputError(f"{file}: {name} is {value!r}; adapters with this field are not supported")


def _typed(file: epath.Path, name: str, value: Any) -> Any:
    if not _KINDS[name].test(value):
        raise InputError(f"{file}: {name} is {_KINDS[name].words}, not {value!r}")
    return tuple(value) if isinstance(value, list) else value


def _adapts(targets: tuple[str, ...] | str, module: str) -> bool:
    if targets == _ALL_LINEAR:
        return module != "lm_head"
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == end or module.endswith(f".{end}") for end in targets)


def _unknown(file: epath.Path, field: str, name: str, modules: Collection[str]) -> InputError:
    hint = nearest(name, {module.rpartition(".")[2] for module in modules})
    return InputError(f"{file}: {field} names {name!r}, which the base does not have{hint}")


def _by_pattern(pattern: Mapping[str, float], module: str, default: float) -> float:
    for regex, value in pattern.items():
        if re.match(rf"(.*\.)?({regex})$", module):
            return value
    return default


def _plain(value: Any) -> Any:
    """Returns a value as JSON holds it; whole numbers are integers, as PEFT has them."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return list(value) if isinstance(value, tuple) else value
