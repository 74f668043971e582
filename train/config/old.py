"""What older formats wrote otherwise, in one table: keys of configs, and fields of methods.

Runs of these formats are read by `upgrade_config` and `upgrade_methods`. A user's file or flag with an old
name is an error that gives the new one.
"""

import re
from collections.abc import Mapping
from typing import Any

from mora_jax.errors import InputError
from mora_jax.methods.registry import METHODS, OPERATORS, flat_fields, from_json
from mora_jax.models.llama import STACKED
from mora_jax.on import On, choice_to_json
from train.config.sections import REST

KEYS = {"method.adapt": "params.adapt", "method.train": "params.train"}
LAYERS = {
    "unrolled": {"layers": "unrolled", "remat": "none"},
    "scan": {"layers": "scan", "remat": "dots"},
    "remat": {"layers": "scan", "remat": "full"},
}
METHOD_FIELDS = {"lora": {"train": "train_factors"}}
# Defaults that match more today, with what they were.
WIDER = {"params.train": ("embed_tokens/embedding|(layers/)?[a-z_]*norm/scale|lm_head/kernel", REST)}
STATE_FIELDS = {"spikes": "guard"}  # of TrainState: today's name -> that of format 1


def check_key(key: str, value: Any) -> None:
    """Raises InputError for a key, or a key with a value, that has another name now."""
    if key in KEYS:
        raise InputError(f"{key} is now {KEYS[key]}")
    if key == "compute.layers" and value == "remat":
        raise InputError("compute.layers remat is now compute.layers scan with compute.remat full")


def check_flag(key: str) -> None:
    """Raises InputError for a flag, given as a key, that has another name now."""
    if key in KEYS:
        raise InputError(f"--{key} is now --{KEYS[key]}")


def upgrade_config(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a plain config of format 1 with today's keys. What is of no known form stays as it is."""
    config = dict(plain)
    method, compute = config.get("method"), config.get("compute")
    if isinstance(method, Mapping):
        moved = {new.removeprefix("params."): old.removeprefix("method.") for old, new in KEYS.items()}
        config["params"] = {new: method[old] for new, old in moved.items() if old in method}
        config["method"] = _flat_method(method)
    if isinstance(compute, Mapping) and "layers" in compute and "remat" not in compute:
        config["compute"] = {**compute, **LAYERS.get(compute["layers"], {})}
    if isinstance(config.get("rules"), list):
        config["rules"] = [
            [rule[0], _method(rule[1])] if isinstance(rule, list) and len(rule) == 2 else rule
            for rule in config["rules"]
        ]
    return config


def renewed(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config by dotted keys, with today's defaults in the place of those that match more now."""
    today = {key: new for key, (before, new) in WIDER.items() if flat.get(key) == before}
    return {**flat, **today}


def upgrade_methods(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the methods of a checkpoint by path, with today's fields and the stacks that were left out."""
    return {path: _on_stack(path, _method(choice)) for path, choice in plain.items()}


def _on_stack(path: str, choice: Any) -> Any:
    bare = isinstance(choice, Mapping) and "method" not in choice and re.fullmatch(STACKED, path)
    return choice_to_json(On(from_json(choice), stack=(0,))) if bare else choice


def _method(choice: Any) -> Any:
    if not isinstance(choice, Mapping):
        return choice
    renamed = METHOD_FIELDS.get(str(choice.get("name")), {})
    return {renamed.get(key, key): value for key, value in choice.items()}


def _flat_method(method: Mapping[str, Any]) -> dict[str, Any]:
    """Only the fields that the method and its operator have; in format 1 all stood side by side."""
    name, operator = method.get("name", "mora"), method.get("operator")
    if name not in METHODS:
        return {"name": name}
    known = flat_fields(METHODS[name], operator if operator in OPERATORS else None)
    return {"name": name} | {key: value for key, value in method.items() if key in known}
