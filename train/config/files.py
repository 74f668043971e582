"""YAML files that hold a mapping, read within bounds: a file may come from anywhere."""

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from mora_jax.errors import InputError
from mora_jax.io import read_text

# A config has about a hundred values, in some kilobytes.
YAML_LIMIT = 1 << 18
YAML_VALUES = 10_000
YAML_DEPTH = 32


def read_yaml(path: str) -> dict[str, Any]:
    """Returns the mapping in a YAML file.

    Raises:
      InputError: naming the file, if it is missing, too large, nested too deeply or no mapping.
    """
    text = read_text(path, YAML_LIMIT)
    try:
        data = _construct(text)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    # Apart from the first, these are PyYAML's errors for a tag, such as !!int, that fits no value.
    except (yaml.YAMLError, ValueError, ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: a config is a mapping of keys to values")
    return data


@contextlib.contextmanager
def located(path: str) -> Iterator[None]:
    """Puts the file's name before the message of an InputError."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _construct(text: str) -> Any:
    """Returns what a YAML text holds, once its size with all aliases expanded is known to be small."""
    loader = _ShallowLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _expanded(node, {})
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


def flatten(plain: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields pairs of dotted name and value of nested mappings; an empty mapping is a value."""
    for key, value in plain.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
