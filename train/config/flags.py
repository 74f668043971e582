"""Configs and commands from command lines and YAML files; every error is one line."""

import contextlib
import dataclasses
import io
import itertools
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import tyro
from etils import epath

from mora_jax import hf
from mora_jax.errors import InputError, located, nearest
from mora_jax.models.config import LlamaConfig
from train.config import method as method_flags
from train.config import old
from train.config.adapter import with_adapter
from train.config.files import flatten, read_yaml
from train.config.method import MethodChoice
from train.config.run import RunConfig, groups_from_plain, rules_from_plain
from train.config.sections import YAML_ONLY, Optimizer
from train.storage.format import KEY, check_format

C = TypeVar("C")


class File(NamedTuple):
    """The values of a config file.

    Attributes:
      config: the default config with what has no flag: rules and groups of the optimizer.
      words: the other values as flags.
      method: the keys of `method`.
    """

    config: RunConfig
    words: tuple[str, ...] = ()
    method: Mapping[str, Any] = {}


def parse(
    command: type[C],
    args: Sequence[str],
    program: str,
    default: Any = tyro.MISSING_NONPROP,
    file: File | None = None,
) -> C:
    """Builds `command` from flags.

    The flags of a run's method are those of the method and operator that `args` name, or else the file, or
    else the default.

    Args:
      command: a dataclass; a config has the field `run` or is the command itself.
      args: the flags.
      program: the command as the user types it, for --help.
      default: what to start from.
      file: values that `args` override.

    Raises:
      InputError: for an unknown flag (with the nearest known one), a value that does not parse or is out of
        range, a missing argument.
      SystemExit: after printing, for --help.
    """
    method = _method(default, file, args)
    _check_known(command, method, args)
    words = [*(file.words if file else ()), *args]
    default = _like_source(default, words)
    # A config's switches take a value, as in YAML: --model.tie-word-embeddings True.
    markers = (tyro.conf.FlagConversionOff,) if command is RunConfig else ()
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            made = tyro.cli(
                command,
                args=words,
                prog=program,
                default=default,
                config=markers,
                registry=method_flags.method_rule(method),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise _input_error(stop) or InputError(_one_line(complaint.getvalue())) from None
    _check_length(made, words)
    return _with_adapter(made, file, args)


def read_config(path: str, args: Sequence[str] = ()) -> RunConfig:
    """Returns a run's config from its YAML file; flags override the file's values.

    Raises:
      InputError: naming the file and the key or flag at fault.
    """
    file = read_file(path)
    with contextlib.nullcontext() if args else located(path):
        return parse(RunConfig, args, "mora", file.config, file)


def config_from_plain(plain: Mapping[str, Any]) -> RunConfig:
    """Returns the config that nested plain data describes; keys left out take their defaults.

    Raises:
      InputError: naming the key at fault.
    """
    file = file_of(plain)
    return parse(RunConfig, (), "mora", file.config, file)


def read_file(path: str) -> File:
    """Returns the values of a config file, which may be a run's own of any format.

    Raises:
      InputError: naming the file, and an unknown key with the nearest known one.
    """
    plain = read_yaml(path, texts(RunConfig))
    number = check_format(plain, path)
    plain.pop(KEY, None)
    if number == 1 and _of_a_run(path):
        plain = old.upgrade_config(plain)
    with located(path):
        return file_of(plain)


def file_of(plain: Mapping[str, Any]) -> File:
    """Returns the values of a config as nested plain data. Raises InputError, naming the key at fault."""
    flat = dict(flatten(plain))
    for key, value in flat.items():
        old.check_key(str(key), value)
    rules = rules_from_plain(flat.pop("rules", []))
    groups = groups_from_plain(flat.pop("optimizer.groups", []))
    config = RunConfig(rules=rules, optimizer=Optimizer(groups=groups))
    section = {key.removeprefix("method."): flat.pop(key) for key in list(flat) if _of_method(key)}
    if (whole := flat.pop("method", {})) != {}:
        raise InputError(f"method is a mapping such as {{name: mora, rank: 128}}, not {whole!r}")
    method_flags.changed_to(config.method, section, None, None)
    known = [name for name in scalar_fields(RunConfig) if not _of_method(name)]
    words = tuple(word for key, value in flat.items() for word in _words(str(key), value, known))
    return File(config, words, section)


def scalar_fields(cls: type, method: MethodChoice | None = None) -> Iterator[str]:
    """Yields the dotted names of all fields that have a flag.

    Args:
      cls: a dataclass.
      method: the method whose flags a run has; the default one if None.
    """
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):  # pyright: ignore[reportArgumentType]
        kind = hints[field.name]
        if kind == MethodChoice:
            method = RunConfig().method if method is None else method
            yield from (f"{field.name}.{name}" for name in method_flags.to_plain(method))
        elif dataclasses.is_dataclass(kind):
            prefix = "" if field.name == "run" else f"{field.name}."  # a command's run config has no prefix
            yield from (prefix + name for name in scalar_fields(typing.cast(type, kind), method))
        elif field.name not in YAML_ONLY:
            yield field.name


def texts(cls: type, prefix: str = "") -> frozenset[str]:
    """Returns the dotted names of the fields that hold text."""
    found: set[str] = set()
    for name, kind in typing.get_type_hints(cls).items():
        if kind is str:
            found.add(prefix + name)
        elif dataclasses.is_dataclass(kind):
            found |= texts(typing.cast(type, kind), f"{prefix}{name}.")
    return frozenset(found)


def _with_adapter(made: Any, file: File | None, args: Sequence[str]) -> Any:
    """Returns a command, or config, with the rules of the adapter that its config names."""
    config = getattr(made, "run", made)
    if not isinstance(config, RunConfig):
        return made
    flags = {arg.partition("=")[0].removeprefix("--").replace("-", "_") for arg in args}
    keys = {
        *(file.method if file else ()),
        *(key.removeprefix("method.") for key in flags if _of_method(key)),
    }
    plain = method_flags.to_plain(config.method)
    config = with_adapter(config, {key: value for key, value in plain.items() if key in keys})
    return config if isinstance(made, RunConfig) else dataclasses.replace(made, run=config)


def _check_length(made: Any, words: Sequence[str]) -> None:
    """Raises InputError if the length of a run is given twice, in steps and in epochs."""
    config = getattr(made, "run", made)
    if isinstance(config, RunConfig) and config.epochs and given(words, "steps") is not None:
        raise InputError(f"give either steps or epochs: epochs is {config.epochs}, and steps is given too")


def _like_source(default: Any, words: Sequence[str]) -> Any:
    """Returns a command, or config, with the model of `init_from`, if no option of the model is given."""
    config = getattr(default, "run", default)
    source = given(words, "init-from")
    if not isinstance(config, RunConfig) or not source or any(word.startswith("--model.") for word in words):
        return default
    with located(source, "--init-from"):
        model = _model_of(source)
    length = min(config.data.sequence_length, model.max_position_embeddings)
    data = dataclasses.replace(config.data, sequence_length=length)
    config = dataclasses.replace(config, model=model, data=data)
    return config if isinstance(default, RunConfig) else dataclasses.replace(default, run=config)


def _model_of(source: str) -> LlamaConfig:
    """Returns the config of the model in the folder of a run, or of Hugging Face."""
    folder = hf.local_folder(source)
    own = str(folder / "config.yaml")
    return read_config(own).model if _of_a_run(own) else hf.read_config(folder)


def given(words: Sequence[str], flag: str) -> str | None:
    """Returns the value that words of a command line give to `--FLAG` last, None if they do not."""
    found = None
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") == f"--{flag}":
            found = value if equals else next(iter(words[i + 1 :]), None)
    return found


def _of_a_run(path: str) -> bool:
    """Whether the file is the config that a run wrote into its folder."""
    place = epath.Path(path)
    return place.name == "config.yaml" and (place.parent / "checkpoints").exists()


def _method(default: Any, file: File | None, args: Sequence[str]) -> MethodChoice:
    """The method that decides which flags there are, and their defaults."""
    config = getattr(default, "run", default)
    method = config.method if isinstance(config, RunConfig) else RunConfig().method
    name, operator = (given(args, f"method.{key}") for key in ("name", "operator"))
    return method_flags.changed_to(method, file.method if file else {}, name, operator)


def _check_known(command: type, method: MethodChoice, args: Sequence[str]) -> None:
    fields = list(scalar_fields(command, method))
    known = {f"--{name.replace('_', '-')}" for name in fields}
    known |= {f"--no-{name.replace('_', '-')}" for name in fields if getattr(command, name, None) is True}
    for arg in args:
        flag = arg.partition("=")[0].replace("_", "-")
        if not re.match(r"--[a-z]", flag) or flag in known | {"--help"}:
            continue
        key = flag.removeprefix("--").replace("-", "_")
        old.check_flag(key)
        if _of_method(key) and any(_of_method(name) for name in fields):
            raise method_flags.lacks(method, key.removeprefix("method."))
        raise InputError(f"unknown option {flag}{nearest(flag, known)}")


def _of_method(key: Any) -> bool:
    return str(key).startswith("method.")


def word(key: str, value: Any) -> str:
    """Returns a key and its value as a flag, in one word, so that no value is taken for a flag.

    Raises:
      InputError: naming the key, for a value that no flag has.
    """
    if value is None:
        raise InputError(f"{key} has no value; give one or remove the key")
    if isinstance(value, list | dict | set):
        raise InputError(f"{key} is one value, not {value!r}")
    if not str(value).isprintable():
        raise InputError(f"{key} {value!r} has characters that cannot be printed")
    return f"--{key.replace('_', '-')}={value}"


def _words(key: str, value: Any, known: Sequence[str]) -> Iterator[str]:
    if section := [name for name in known if name.startswith(f"{key}.")]:
        if value != {}:
            raise InputError(f"{key} is a section with keys such as {section[0]}, not {value!r}")
        return
    if key not in known:
        raise InputError(f"unknown key {key}{nearest(key, known)}")
    yield word(key, value)


def _input_error(error: BaseException | None) -> InputError | None:
    """The error of one of our dataclasses that made tyro stop."""
    while error is not None and not isinstance(error, InputError):
        error = error.__context__
    return error


def _one_line(box: str) -> str:
    """tyro's error without its frame, its title and its help."""
    lines = [
        line.strip(" │╭╮╰╯─") if set(line) & set("─│") or line.startswith(" ") else ""
        for line in box.splitlines()
    ]
    body = itertools.takewhile(bool, itertools.dropwhile(lambda line: not line, lines[1:]))
    return re.sub(r"^Error parsing [a-zA-Z]\S*: ", "", " ".join(body))
