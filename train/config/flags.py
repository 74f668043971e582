"""Command lines into frozen dataclasses by tyro, with every complaint as one clear line."""

import contextlib
import dataclasses
import io
import itertools
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import tyro
import yaml

from mora_jax.errors import InputError, nearest
from mora_jax.io import read_text
from train.config import run as run_config

C = TypeVar("C")
# A config has a hundred values, in some kilobytes.
YAML_LIMIT = 1 << 18
YAML_VALUES = 10_000
YAML_DEPTH = 32


def parse(command: type[C], args: Sequence[str], program: str, default: Any = tyro.MISSING_NONPROP) -> C:
    """Builds `command` from flags.

    Raises:
      InputError: an unknown flag (with the nearest right one), a value that does not parse or is out of
        range, a missing argument.
      SystemExit: after printing, for --help.
    """
    known = {f"--{name.replace('_', '-')}" for name in scalar_fields(command)}
    known |= {f"--no-{name}" for name in scalar_fields(command) if getattr(command, name, None) is True}
    for arg in args:
        flag = arg.partition("=")[0].replace("_", "-")
        if re.match(r"--[a-z]", flag) and flag not in known | {"--help"}:
            raise InputError(f"unknown option {flag}{nearest(flag, known)}")
    # A config's switches take a value, as in YAML: --model.tie-word-embeddings True.
    markers = (tyro.conf.FlagConversionOff,) if command is run_config.RunConfig else ()
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(command, args=list(args), prog=program, default=default, config=markers)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise _ours(stop) or InputError(_one_line(complaint.getvalue())) from None


def read_config(path: str, args: Sequence[str] = ()) -> run_config.RunConfig:
    """A run's config from its YAML file, flags going over the file's values.

    Raises:
      InputError: naming the file and the key or flag at fault.
    """
    words, rules = words_of_yaml(path)
    with contextlib.nullcontext() if args else located(path):
        return parse(run_config.RunConfig, [*words, *args], "mora", run_config.RunConfig(rules=rules))


def words_of_yaml(path: str) -> tuple[list[str], tuple[run_config.Rule, ...]]:
    """A config file as flags, and its rules, which have none.

    Raises:
      InputError: naming the file, and the unknown key with the nearest right one.
    """
    plain = read_yaml(path)
    with located(path):
        rules = run_config.rules_from_plain(plain.pop("rules", []))
    known = set(scalar_fields(run_config.RunConfig))
    words: list[str] = []
    for key, value in flatten(plain):
        if value == {} and any(name.startswith(f"{key}.") for name in known):
            continue
        if key not in known:
            raise InputError(f"{path}: unknown key {key}{nearest(key, known)}")
        if value is None:
            raise InputError(f"{path}: {key} has no value; give one or remove the key")
        if isinstance(value, list | dict | set):
            raise InputError(f"{path}: {key} is one value, not {value!r}")
        if not str(value).isprintable():
            raise InputError(f"{path}: {key} {value!r} has characters that cannot be printed")
        # In one word: a value that begins with a dash must not be taken for a flag.
        words.append(f"--{key.replace('_', '-')}={value}")
    return words, rules


def read_yaml(path: str) -> dict[str, Any]:
    """A YAML file that holds a mapping. Raises InputError if it is missing, too large or anything else."""
    text = read_text(path, YAML_LIMIT)
    try:
        data = _construct(text)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    # All but the first are how PyYAML says that a tag, such as !!int, !!timestamp or !!bool, fits no value.
    except (yaml.YAMLError, ValueError, ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: a config is a mapping of keys to values")
    return data


def _construct(text: str) -> Any:
    """What a YAML text says, made only when it is known how much that is with all aliases spelled out."""
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
    """Stops at nesting that no config has, for which PyYAML takes time with the square, and the stack."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        if self.depth > YAML_DEPTH:
            raise InputError("it is nested too deeply")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _expanded(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for. Raises InputError for too many, and for one that holds itself."""
    if id(node) not in known:
        known[id(node)] = YAML_VALUES + 1  # as long as it is being looked into
        inner = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = itertools.chain.from_iterable(inner) if isinstance(node, yaml.MappingNode) else inner
        known[id(node)] = 1 + sum(_expanded(part, known) for part in parts)
    if known[id(node)] > YAML_VALUES:
        raise InputError(f"with its aliases spelled out it holds more than {YAML_VALUES:,} values")
    return known[id(node)]


def scalar_fields(cls: type) -> Iterator[str]:
    """The dotted names of all fields that have a flag."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):  # pyright: ignore[reportArgumentType]
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            prefix = "" if field.name == "run" else f"{field.name}."  # a command's run config has no prefix
            yield from (prefix + name for name in scalar_fields(typing.cast(type, kind)))
        elif field.name != "rules":
            yield field.name


def flatten(plain: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as pairs of dotted name and value; an empty mapping is a value."""
    for key, value in plain.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@contextlib.contextmanager
def located(path: str) -> Iterator[None]:
    """Puts the file's name before the message of an InputError."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _ours(error: BaseException | None) -> InputError | None:
    """The complaint of one of our dataclasses that made tyro stop, word for word."""
    while error is not None and not isinstance(error, InputError):
        error = error.__context__
    return error


def _one_line(box: str) -> str:
    """tyro's complaint without its frame, its title and its help."""
    lines = [
        line.strip(" │╭╮╰╯─") if set(line) & set("─│") or line.startswith(" ") else ""
        for line in box.splitlines()
    ]
    body = itertools.takewhile(bool, itertools.dropwhile(lambda line: not line, lines[1:]))
    return re.sub(r"^Error parsing [a-zA-Z]\S*: ", "", " ".join(body))
