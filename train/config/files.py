"""YAML files that hold a mapping, read within bounds: a file may come from anywhere.

YAML 1.1 reads some values as nobody means them (`010` is 8, `1:30` is 90, `off` is false) and lets the last
of two equal keys win. Text is taken as it is written, and the rest is refused with its line.
"""

import itertools
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import yaml

from mora_jax.errors import InputError, located
from mora_jax.io import read_text

# A config has about a hundred values, in some kilobytes.
YAML_LIMIT = 1 << 18
YAML_VALUES = 10_000
YAML_DEPTH = 32

_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"
_NUMBERS = (f"{_TAG}int", f"{_TAG}float")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")


def read_yaml(path: str, texts: Collection[str] = ()) -> dict[str, Any]:
    """Returns the mapping in a YAML file.

    Args:
      path: the file.
      texts: dotted names of keys whose values are text: `off`, `1.10` and `007` stay as they are written.

    Raises:
      InputError: naming the file, if it is missing, too large, nested too deeply or no mapping; and the line,
        if a key is given twice or YAML reads a number otherwise than it is written.
    """
    text = read_text(path, YAML_LIMIT)
    try:
        with located(path):
            data = _construct(text, texts)
    except InputError:  # a ValueError
        raise
    # Apart from the first, these are PyYAML's errors for a tag, such as !!int, that fits no value.
    except (yaml.YAMLError, ValueError, ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: a config is a mapping of keys to values")
    return data


def _construct(text: str, texts: Collection[str]) -> Any:
    """Returns what a YAML text holds, once its size with all aliases expanded is known to be small."""
    loader = _ShallowLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _expanded(node, {})
        _check_literal(node, "", texts, {})
        return loader.construct_document(node)
    finally:
        loader.dispose()


class _ShallowLoader(yaml.SafeLoader):
    """Refuses deep nesting, for which PyYAML takes quadratic time and overflows the stack."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        if self.depth > YAML_DEPTH:
            raise InputError("it is nested too deeply")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _expanded(node: yaml.Node, known: dict[int, int]) -> int:
    """Counts the values of a node. Raises InputError for too many, and for a node that contains itself."""
    if id(node) not in known:
        known[id(node)] = YAML_VALUES + 1  # until it is counted
        inner = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = itertools.chain.from_iterable(inner) if isinstance(node, yaml.MappingNode) else inner
        known[id(node)] = 1 + sum(_expanded(part, known) for part in parts)
    if known[id(node)] > YAML_VALUES:
        raise InputError(f"with its aliases spelled out it holds more than {YAML_VALUES:,} values")
    return known[id(node)]


def _check_literal(node: yaml.Node, name: str, texts: Collection[str], seen: dict[str, int]) -> None:
    """Makes the values of `texts` strings. Raises InputError for what YAML 1.1 would change silently.

    Args:
      node: what to check, with all that it contains.
      name: its dotted name.
      texts: dotted names of keys whose values are text.
      seen: lines of the values so far, by dotted name.
    """
    if isinstance(node, yaml.MappingNode):
        _check_mapping(node, name, texts, seen)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_literal(item, name, (), {})
    elif name in texts and node.tag != f"{_TAG}null":
        node.tag = f"{_TAG}str"
    elif isinstance(node, yaml.ScalarNode):
        _check_number(node)


def _check_mapping(node: yaml.MappingNode, name: str, texts: Collection[str], seen: dict[str, int]) -> None:
    here: dict[str, int] = {}
    for key, value in node.value:
        if key.tag == _MERGE:  # what is merged may be given again
            for part in value.value if isinstance(value, yaml.SequenceNode) else (value,):
                _check_literal(part, name, texts, {})
            continue
        dotted = f"{name}.{key.value}" if name else str(key.value)
        section = isinstance(value, yaml.MappingNode) and value.value
        first = here.get(dotted) or (None if section else seen.get(dotted))
        if first:
            raise InputError(
                f"line {_line(key)}: {dotted} is given again, after line {first}; remove one of them"
            )
        here[dotted] = _line(key)
        if not section:
            seen[dotted] = _line(key)
        _check_literal(value, dotted, texts, seen)


def _check_number(node: yaml.ScalarNode) -> None:
    plain = node.style is None or node.tag in _NUMBERS
    if plain and _LEADING_ZERO.fullmatch(node.value):
        raise InputError(
            f"line {_line(node)}: {node.value} has a leading zero, which YAML reads as octal or as text; "
            "leave the zero out"
        )
    if node.tag in _NUMBERS and ":" in node.value:
        raise InputError(
            f"line {_line(node)}: YAML reads {node.value} in base 60; write one number, or text in quotes"
        )


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def flatten(plain: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields pairs of dotted name and value of nested mappings; an empty mapping is a value."""
    for key, value in plain.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
