"""Command lines into frozen dataclasses by tyro, with every complaint as one clear line."""

import contextlib
import dataclasses
import difflib
import io
import itertools
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import tyro
import yaml
from etils import epath

from mora_jax.errors import InputError
from train import config as run_config

C = TypeVar("C")


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
        if key not in known:
            raise InputError(f"{path}: unknown key {key}{nearest(key, known)}")
        if value is None:
            raise InputError(f"{path}: {key} has no value; give one or remove the key")
        words += [f"--{key.replace('_', '-')}", str(value)]
    return words, rules


def read_yaml(path: str) -> dict[str, Any]:
    """A YAML file that holds a mapping. Raises InputError if it is missing or anything else."""
    try:
        data = yaml.safe_load(epath.Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot read this config: {_reason(error)}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: a config is a mapping of keys to values")
    return data


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
    """Nested mappings as pairs of dotted name and value."""
    for key, value in plain.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """A hint at the right name, or nothing if none is near."""
    near = difflib.get_close_matches(word, sorted(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


@contextlib.contextmanager
def located(path: str) -> Iterator[None]:
    """Puts the file's name before the message of an InputError."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else "it is not UTF-8 text"


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
