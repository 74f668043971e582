"""The methods. A new one is one file here and one entry in METHODS."""

import contextlib
import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, get_type_hints

from mora_jax.errors import InputError
from mora_jax.methods.base import Adapter, Leaf, Method
from mora_jax.methods.dora import DoRA
from mora_jax.methods.linear import Path, dense
from mora_jax.methods.lora import LoRA
from mora_jax.methods.mora import MoRA
from mora_jax.methods.operators import OPERATORS, Decouple, Operator, Rotate, Share, Truncate

METHODS: tuple[type[Method], ...] = (MoRA, LoRA, DoRA)

__all__ = [
    "METHODS",
    "OPERATORS",
    "Adapter",
    "Decouple",
    "DoRA",
    "Leaf",
    "LoRA",
    "Method",
    "MoRA",
    "Operator",
    "Path",
    "Rotate",
    "Share",
    "Truncate",
    "dense",
    "from_json",
    "to_json",
]


def to_json(method: Method | Operator) -> dict[str, Any]:
    """A method or operator as plain data: its `name` and its fields."""
    fields = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}  # pyright: ignore[reportArgumentType]
    plain = {k: to_json(v) if isinstance(v, Operator) else v for k, v in fields.items()}
    return {"name": method.name, **{k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}}


def from_json(data: Mapping[str, Any]) -> Method:
    """The inverse of `to_json`; fields left out take their defaults.

    Raises:
      InputError: for a name that no method has, a field that the method does not have, or a bad value.
    """
    return _build(METHODS, "method", data)


def _build(classes: tuple[type, ...], kind: str, data: Mapping[str, Any]) -> Any:
    by_name = {c.name: c for c in classes}
    if not isinstance(data, Mapping) or not isinstance(data.get("name"), str):
        raise InputError(f"{kind}: give a mapping with a name ({', '.join(by_name)}), not {data!r}")
    if data["name"] not in by_name:
        raise InputError(f"no {kind} is named {data['name']!r}{_nearest(data['name'], by_name)}")
    chosen = by_name[data["name"]]
    known = [f.name for f in dataclasses.fields(chosen)]
    fields = {k: v for k, v in data.items() if k != "name"}
    for key in fields:
        if key not in known:
            raise InputError(f"{kind} {chosen.name} has no field {key!r}{_nearest(str(key), known)}")
    if "operator" in fields:
        fields["operator"] = _build(OPERATORS, "operator", fields["operator"])
    hints = get_type_hints(chosen)
    return chosen(**{k: _typed(f"{chosen.name}'s {k}", v, hints[k]) for k, v in fields.items()})


def _typed(what: str, value: Any, kind: Any) -> Any:
    """The value as a field of this type; YAML reads 1e-3 as a string. Fields of choices check themselves."""
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            value = float(value)
    if kind in (int, float, bool) and type(value) is not kind:
        raise InputError(
            f"{what} is {'a number' if kind is float else f'of type {kind.__name__}'}, not {value!r}"
        )
    return value


def _nearest(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}"
