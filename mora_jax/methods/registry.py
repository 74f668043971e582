"""Methods and operators by name, and their two forms as plain data.

A new method is one file and one entry in METHODS, which is read whenever a name is looked up. In the nested
form, that of rules and checkpoints, an operator is a mapping of its own. In the flat form, that of configs
and flags, `operator` is a name, and the operator's fields stand beside the method's.
"""

import contextlib
import dataclasses
import types
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from mora_jax.errors import InputError, nearest
from mora_jax.methods.base import Method
from mora_jax.methods.dora import DoRA
from mora_jax.methods.lora import LoRA
from mora_jax.methods.mora import MoRA
from mora_jax.methods.operators import OPERATORS, Operator
from mora_jax.methods.peft import PeftAdapter
from mora_jax.methods.spectral import Spectral

METHODS: dict[str, type[Method]] = {c.name: c for c in (MoRA, LoRA, DoRA, Spectral)}

T = TypeVar("T")


class Field(NamedTuple):
    """One entry of a method's flat form.

    Attributes:
      kind: its type; `Operator` for the entry that holds an operator's name.
      default: its value where none is given.
      owner: the dataclass whose docstring explains it.
    """

    kind: Any
    default: Any
    owner: type


def to_json(method: Method | Operator) -> dict[str, Any]:
    """Returns the nested form of a method or operator: its `name` and its fields."""
    plain = {key: to_json(v) if isinstance(v, Operator) else v for key, v in _values(method).items()}
    return {"name": method.name, **{k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}}


def to_flat(method: Method) -> dict[str, Any]:
    """Returns the flat form of a method."""
    plain = to_json(method)
    operator = plain.get("operator")
    if isinstance(operator, dict):
        plain |= {**operator, "name": method.name, "operator": operator["name"]}
    return plain


def from_json(data: Mapping[str, Any]) -> Method:
    """Returns the method that either form describes; fields left out take their defaults.

    Raises:
      InputError: for a name that no method or operator has, a field that they lack, or a bad value.
    """
    if not isinstance(data, Mapping) or not isinstance(data.get("name"), str):
        raise InputError(f"method: give a mapping with a name ({', '.join(METHODS)}), not {data!r}")
    method = named("method", data["name"], METHODS)
    fields = {key: value for key, value in data.items() if key != "name"}
    if not isinstance(fields.get("operator"), Mapping):
        fields = _nested(method, fields)
    if isinstance(fields.get("operator"), Mapping):
        fields["operator"] = _operator(fields["operator"])
    return _build("method", method, fields)


def stated(found: PeftAdapter) -> dict[str, Any]:
    """Returns what an adapter file states of a method: its `name` and fields of its flat form.

    Raises:
      InputError: if no method reads such a file.
    """
    for method in METHODS.values():
        fields = method.from_peft(found)
        if fields is not None:
            return {"name": method.name, **fields}
    kind = f"mora_type {found.mora_type}" if found.mora_type else "its fields"
    raise InputError(f"no method computes an adapter of {kind}{' with use_dora' if found.dora else ''}")


def flat_fields(method: type[Method], operator: str | None = None) -> dict[str, Field]:
    """Returns the entries of a method's flat form, without `name`, those of its operator last.

    Args:
      method: the method.
      operator: the operator's name; the method's default one if None.
    """
    fields = {name: Field(kind, default, method) for name, (kind, default) in _fields(method).items()}
    if "operator" not in fields or fields["operator"].kind is not Operator:
        return fields
    default = fields["operator"].default
    name = operator or default.name
    chosen = named("operator", name, OPERATORS)
    instance = default if chosen.name == default.name else chosen()
    fields["operator"] = fields["operator"]._replace(default=name)
    return fields | {
        name: Field(kind, getattr(instance, name), chosen) for name, (kind, _) in _fields(chosen).items()
    }


def changed(method: Method) -> dict[str, Any]:
    """Returns the entries of a method's flat form that are not their defaults, and its `name`."""
    flat = to_flat(method)
    fields = flat_fields(type(method), flat.get("operator"))
    plain_operator = flat_fields(type(method)).get("operator")
    kept = {key: value for key, value in flat.items() if key in fields and value != fields[key].default}
    if plain_operator and flat["operator"] != plain_operator.default:
        kept["operator"] = flat["operator"]
    return {"name": method.name, **kept}


def fitting(flat: Mapping[str, Any], name: str, operator: str | None = None) -> dict[str, Any]:
    """Returns entries of a flat form as those of another method: the ones that it has as well.

    Args:
      flat: the entries, not necessarily all of a method.
      name: the new method.
      operator: its operator; if None that of `flat`, or else the method's default one.
    """
    method = named("method", name, METHODS)
    operator = operator or flat.get("operator")
    known = flat_fields(method, operator)
    kept = {key: value for key, value in flat.items() if key in known}
    return {"name": name, **kept} | ({"operator": operator} if operator and "operator" in known else {})


def named(kind: str, name: Any, known: Mapping[str, T]) -> T:
    """Returns the entry of this name. Raises InputError, with the known names, if there is none."""
    if not isinstance(name, str):
        raise InputError(f"{kind}: give a name ({', '.join(known)}), not {name!r}")
    if name not in known:
        raise InputError(f"no {kind} is named {name!r}{nearest(name, known)} (there are {', '.join(known)})")
    return known[name]


def no_field(what: str, key: str, known: Iterable[str], where: str = "") -> InputError:
    """Returns the error for a field that a method or operator lacks."""
    hint = f"{nearest(key, known)} (it has {', '.join(known) or 'none'})"
    return InputError(f"{what} has no field {key}{where}{hint}")


def _nested(method: type[Method], flat: dict[str, Any]) -> dict[str, Any]:
    if flat.get("operator", "") is None:
        raise InputError(f"operator: give a name ({', '.join(OPERATORS)})")
    known = flat_fields(method, flat.get("operator"))
    operator = f" with operator {known['operator'].default}" if "operator" in known else ""
    _check_known(f"method {method.name}", flat, known, operator)
    inner = {key: field.default for key, field in known.items() if field.owner is not method}
    own = {key: value for key, value in flat.items() if key not in inner}
    if own.keys() == flat.keys() and "operator" not in flat:
        return own
    given = {key: flat[key] for key in inner if key in flat}
    return own | {"operator": {"name": known["operator"].default} | inner | given}


def _operator(data: Mapping[str, Any]) -> Operator:
    operator = named("operator", data.get("name"), OPERATORS)
    return _build("operator", operator, {key: value for key, value in data.items() if key != "name"})


def _build(kind: str, cls: Any, fields: Mapping[str, Any]) -> Any:
    known = _fields(cls)
    _check_known(f"{kind} {cls.name}", fields, known)
    return cls(**{k: _typed(f"{cls.name}'s {k}", v, known[k][0]) for k, v in fields.items()})


def _check_known(what: str, fields: Mapping[str, Any], known: Iterable[str], where: str = "") -> None:
    for key in fields:
        if key not in known:
            raise no_field(what, str(key), known, where)


def _fields(cls: Any) -> dict[str, tuple[Any, Any]]:
    """The type and the default of every field, MISSING where it must be given."""
    hints = get_type_hints(cls)
    return {f.name: (hints[f.name], f.default) for f in dataclasses.fields(cls)}


def _values(method: Any) -> dict[str, Any]:
    return {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}


def _typed(what: str, value: Any, kind: Any) -> Any:
    """The value as a field of this type; YAML reads 1e-3 as a string. Fields of choices check themselves."""
    if get_origin(kind) in (Union, types.UnionType) and type(None) in get_args(kind):
        kinds = [k for k in get_args(kind) if k is not type(None)]
        return value if value is None or len(kinds) > 1 else _typed(what, value, kinds[0])
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            value = float(value)
    if kind in (int, float, bool) and type(value) is not kind:
        raise InputError(
            f"{what} is {'a number' if kind is float else f'of type {kind.__name__}'}, not {value!r}"
        )
    return tuple(value) if isinstance(value, list) else value
