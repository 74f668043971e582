"""The method of a run as YAML keys and flags: those of the chosen method and operator, and no others."""

import inspect
import re
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from mora_jax.errors import InputError, nearest
from mora_jax.methods import METHODS, OPERATORS, Method, Operator
from mora_jax.methods.registry import changed, fitting, flat_fields, from_json, no_field, to_flat

MethodChoice: TypeAlias = Method | Literal["full", "frozen"]
WITHOUT_ADAPTERS = ("full", "frozen")
_NAME_HELP = "how adapted kernels are updated; full trains every parameter itself, frozen adapts none"


def to_plain(method: MethodChoice) -> dict[str, Any]:
    """Returns a method as the mapping that YAML holds."""
    return {"name": method} if isinstance(method, str) else to_flat(method)


def from_plain(plain: Mapping[str, Any]) -> MethodChoice:
    """Returns the method of a mapping. Raises InputError for a name or a field that does not exist."""
    name = plain.get("name")
    if name not in WITHOUT_ADAPTERS:
        check_name(name)
        return from_json(plain)
    for key in plain.keys() - {"name"}:
        raise no_field(f"method {name}", key, ())
    return name


def changed_to(
    default: MethodChoice, section: Mapping[str, Any], name: str | None, operator: str | None
) -> MethodChoice:
    """Returns the method of a file's section, with another name or operator if these are given.

    Args:
      default: values that the section does not give, where its method has such a field.
      section: the file's `method`; must describe a method by itself.
      name: from the command line; None for the file's. Fields that the new method lacks are dropped.
      operator: likewise.

    Raises:
      InputError: for an unknown name, or a field of the section that its own method lacks.
    """
    base = {"name": default} if isinstance(default, str) else changed(default)
    given = {**base, **section}
    own = from_plain({**_fitting(base, given["name"], section.get("operator")), **section})
    if name is None and operator is None:
        return own
    return from_plain(_fitting(given, name or given["name"], operator))


def check_name(name: Any) -> None:
    """Raises InputError unless there is a method of this name."""
    known = (*METHODS, *WITHOUT_ADAPTERS)
    if name not in known:
        hint = f"{nearest(str(name), known)} (there are {', '.join(known)})"
        raise InputError(f"method.name {name!r}: there is no such method{hint}")


def lacks(method: MethodChoice, key: str) -> InputError:
    """Returns the error for a flag `--method.KEY` that a method does not have."""
    plain = to_plain(method)
    operator = f" with operator {plain['operator']}" if "operator" in plain else ""
    return no_field(f"method {plain['name']}", key, [name for name in plain if name != "name"], operator)


def method_rule(default: MethodChoice) -> ConstructorRegistry:
    """Returns the rule by which tyro builds a run's method from its flags.

    Args:
      default: decides which method and operator the flags are of, and holds their defaults.
    """
    registry = ConstructorRegistry()

    @registry.struct_rule
    def build(info: StructTypeInfo) -> StructConstructorSpec | None:
        if info.type != MethodChoice:
            return None
        return StructConstructorSpec(lambda **given: from_plain(given), tuple(_flags(default)))

    return registry


def attributes(cls: type) -> dict[str, str]:
    """Returns the texts of a class's fields: the `Attributes` of its docstring and of its bases'."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, section = inspect.cleandoc(base.__dict__.get("__doc__") or "").partition("\nAttributes:\n")
        for entry in re.split(r"^  (?=\w+: )", section.partition("\n\n")[0], flags=re.MULTILINE):
            name, _, text = entry.partition(": ")
            found[name] = " ".join(text.split())
    return found


def _fitting(flat: Mapping[str, Any], name: Any, operator: str | None) -> dict[str, Any]:
    if name in WITHOUT_ADAPTERS:
        return {"name": name}
    check_name(name)
    return fitting(flat, name, operator)


def _flags(default: MethodChoice) -> list[StructFieldSpec]:
    names: Any = Literal[(*METHODS, *WITHOUT_ADAPTERS)]  # pyright: ignore[reportInvalidTypeForm]
    values = to_plain(default)
    flags = [StructFieldSpec("name", names, values["name"], _NAME_HELP)]
    if isinstance(default, str):
        return flags
    for name, field in flat_fields(type(default), values.get("operator")).items():
        operators: Any = Literal[tuple(OPERATORS)]  # pyright: ignore[reportInvalidTypeForm]
        kind = operators if field.kind is Operator else field.kind
        value = tuple(values[name]) if isinstance(values[name], list) else values[name]
        flags.append(StructFieldSpec(name, kind, value, attributes(field.owner).get(name, "")))
    return flags
