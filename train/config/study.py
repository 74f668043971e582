"""A study: a base config, variants and axes in a YAML file, expanded into the runs of a table.

Expanding reads the base configs and nothing else. Every run's config is built and checked before any starts.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mora_jax.errors import InputError, located, nearest
from train.config import flags
from train.config.files import flatten, read_yaml
from train.config.method import to_plain as method_to_plain
from train.config.paths import spell_out
from train.config.run import RunConfig, to_plain
from train.config.sections import YAML_ONLY, number

KEYS = ("base", "run_dir", "set", "variants", "axes", "seeds_at_best", "halving")
RATE, SEED = "optimizer.learning_rate", "seed"
MOST_RUNS = 1000
# The longest file name has 255 bytes, and "_lr", "_seed" and ".log" are added.
_MOST_NAME = 150


@dataclasses.dataclass(frozen=True)
class Halving:
    """When runs are compared, and how many of a row continue.

    Attributes:
      at: fractions of the steps, increasing.
      keep: share of the compared runs that continue, rounded up.
    """

    at: tuple[float, ...]
    keep: float = 0.5

    def __post_init__(self) -> None:
        ordered = all(a < b for a, b in itertools.pairwise(self.at))
        if not self.at or not ordered or not all(0 < share < 1 for share in self.at):
            raise InputError(
                f"halving.at is a list of increasing fractions of the steps in (0, 1), not {[*self.at]}"
            )
        if not 0 < self.keep < 1:
            raise InputError(f"halving.keep must lie in (0, 1), not {self.keep}")

    def steps(self, config: RunConfig) -> list[int]:
        """Returns the numbers of updates after which a run is compared."""
        return [round(share * config.steps) for share in self.at]


@dataclasses.dataclass(frozen=True)
class StudyRun:
    """One run of a study.

    Attributes:
      name: that of its folder in the study's folder.
      row: the row of the table: its variant, and its values on all axes but learning rate and seed.
      rate: the peak learning rate.
      seed: its seed.
      base: config file.
      words: flags that override the file's values, among them `--run-dir`.
      config: the config that both amount to.
      at_best: whether it is trained only if `rate` is the best one of its row.
    """

    name: str
    row: str
    rate: float
    seed: int
    base: str
    words: tuple[str, ...]
    config: RunConfig
    at_best: bool = False


@dataclasses.dataclass(frozen=True)
class Study:
    """The runs of a study.

    Attributes:
      file: the study's file.
      run_dir: the study's folder, which holds a folder for each run.
      runs: all runs in the order of the file, those of `seeds_at_best` for every rate at the end.
      halving: None for none.
    """

    file: str
    run_dir: str
    runs: tuple[StudyRun, ...]
    halving: Halving | None = None

    def __post_init__(self) -> None:
        spell_out(self, "", "run_dir")

    def rows(self) -> list[str]:
        """Returns the rows of the table, in order."""
        return list(dict.fromkeys(run.row for run in self.runs))


def read_study(path: str, run_dir: str = "", settings: Sequence[str] = ()) -> Study:
    """Returns the study in a YAML file.

    Args:
      path: the file.
      run_dir: folder of the study; empty for the file's.
      settings: words KEY=VALUE, which override the file's `set`.

    Raises:
      InputError: naming the file and the key, or the variant, axis and value, at fault.
    """
    plain = read_yaml(path, _Texts())
    given = dict(_setting(text) for text in settings)
    with located(path):
        for key in plain:
            if key not in KEYS:
                raise InputError(
                    f"unknown key {key}{nearest(str(key), KEYS)} (a study has {', '.join(KEYS)})"
                )
        common = {**_flat("set", plain.get("set")), **given}
        return expand(path, {**plain, "set": common, "run_dir": run_dir or plain.get("run_dir")})


def expand(file: str, plain: Mapping[str, Any]) -> Study:
    """Returns the study that plain data describes.

    Raises:
      InputError: naming the key, or the variant, axis and value, at fault.
    """
    run_dir = plain.get("run_dir")
    if not isinstance(run_dir, str) or not run_dir:
        raise InputError("run_dir is the folder of the study; give one here or as --run-dir")
    later = _values("seeds_at_best", plain.get("seeds_at_best", []), least=0)
    variants = _mapping("variants", plain.get("variants", {"": {}}))
    if not variants:
        raise InputError("variants is empty; name one, or remove the key")
    runs: list[StudyRun] = []
    for name, own in variants.items():
        variant = _variant(str(name), plain, _flat(f"variants.{name}", own))
        if len(runs) + math.prod(map(len, variant.axes.values())) * (1 + len(later)) > MOST_RUNS:
            raise InputError(f"the study has more than {MOST_RUNS:,} runs; leave out values")
        runs += _expanded(variant, later)
    _check_distinct(runs)
    runs.sort(key=lambda run: run.at_best)
    halving = _halving(plain.get("halving"))
    if halving:
        for run in runs:
            _check_evaluated(run, halving)
    return Study(file, run_dir, tuple(runs), halving)


def short(value: Any) -> str:
    """Returns a value of an axis as names and tables show it.

    >>> short(0.001), short(0.00025), short(64), short("lora")
    ('1e-3', '2.5e-4', '64', 'lora')
    """
    if not isinstance(value, float):
        return str(value)
    mantissa, _, exponent = f"{value:.12e}".partition("e")
    power = int(exponent)
    if -1 <= power < 6:
        return f"{value:.12g}"
    return f"{float(mantissa):.12g}e{power}"


@dataclasses.dataclass(frozen=True)
class _Variant:
    """A variant with its own keys in the place of settings and axes of the same name."""

    name: str
    base: str
    file: flags.File
    fixed: Mapping[str, Any]
    axes: Mapping[str, list[Any]]
    run_dir: str


def _variant(name: str, plain: Mapping[str, Any], own: dict[str, Any]) -> _Variant:
    base = own.pop("base", plain.get("base"))
    if not isinstance(base, str):
        raise InputError("base is the config file that all runs start from, such as configs/demo.yaml")
    common, axes = _flat("set", plain.get("set")), _axes(_flat("axes", plain.get("axes")))
    for key in common.keys() & axes.keys():
        raise InputError(f"{key} is in set and in axes; remove one of them")
    fixed = {key: value for key, value in common.items() if key not in own}
    fixed |= {key: value for key, value in own.items() if not isinstance(value, list) and value is not None}
    axes = {key: values for key, values in axes.items() if key not in own}
    axes |= _axes({key: value for key, value in own.items() if isinstance(value, list)})
    return _Variant(name, base, flags.read_file(base), fixed, axes, str(plain["run_dir"]))


def _expanded(variant: _Variant, later: list[Any]) -> Iterator[StudyRun]:
    """Yields the runs of a variant: those of its axes, and those of its further seeds at every rate."""
    for values in _product(variant.axes):
        yield _run(variant, values, at_best=False)
    others = {key: values for key, values in variant.axes.items() if key != SEED}
    for values in _product({**others, SEED: later}):
        yield _run(variant, values, at_best=True)


def _product(axes: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
    return (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))


def _run(variant: _Variant, values: Mapping[str, Any], at_best: bool) -> StudyRun:
    named = [f"variant {variant.name}"] if variant.name else []
    where = ", ".join([*named, *(f"{key} {value}" for key, value in values.items())])
    with located(where or variant.base):
        words = tuple(_word(key, value) for key, value in {**variant.fixed, **values}.items())
        config = flags.parse(RunConfig, words, "mora", variant.file.config, variant.file)
    plain = dict(flatten(to_plain(config)))
    others = [key for key in values if key not in (RATE, SEED)]
    labels = [
        f"{key.rpartition('.')[2].replace('_', ' ')} {short(plain.get(key, values[key]))}" for key in others
    ]
    row = ", ".join(filter(None, (variant.name, *labels))) or str(method_to_plain(config.method)["name"])
    folder = re.sub(r"[^A-Za-z0-9.+=-]+", "-", row).strip("-.")
    if not folder or len(folder) > _MOST_NAME:
        raise InputError(
            f"{row!r} names a folder: it needs 1 to {_MOST_NAME} characters, some letters or digits"
        )
    rate = config.optimizer.learning_rate
    name = f"{folder}_lr{short(rate)}_seed{config.seed}"
    config = dataclasses.replace(config, run_dir=f"{variant.run_dir}/{name}")
    words = (*words, flags.word("run_dir", config.run_dir))
    return StudyRun(name, row, rate, config.seed, variant.base, words, config, at_best)


def _word(key: str, value: Any) -> str:
    if key == "run_dir":
        raise InputError("run_dir is that of the study, in which each run has a folder; remove the key")
    if key.split(".")[-1] in YAML_ONLY:
        raise InputError(f"{key} has no flag; give the variant a config file of its own: base: FILE")
    return flags.word(key, value)


def _check_distinct(runs: Sequence[StudyRun]) -> None:
    """Raises InputError if two runs have one folder, or are the same run."""
    names: dict[str, StudyRun] = {}
    configs: dict[RunConfig, StudyRun] = {}
    for run in runs:
        if run.name.casefold() in names:
            raise InputError(
                f"two runs are named {run.name}: a value is given twice, or two variants have one name"
            )
        names[run.name.casefold()] = run
        config = dataclasses.replace(run.config, run_dir="run")
        if config in configs:
            raise InputError(f"{configs[config].name} and {run.name} are the same run; remove one of them")
        configs[config] = run


def _check_evaluated(run: StudyRun, halving: Halving) -> None:
    if run.config.epochs:
        raise InputError(f"{run.name}: halving needs steps, and the run has epochs")
    every = run.config.eval.every
    for step in halving.steps(run.config):
        if not 0 < step < run.config.steps or not every or step % every:
            raise InputError(
                f"{run.name}: halving compares runs after {step} of {run.config.steps} steps, where "
                f"eval.every {every} evaluates none; choose a divisor of {step}"
            )


def _halving(plain: Any) -> Halving | None:
    if plain is None:
        return None
    given = _mapping("halving", plain)
    for key in given.keys() - {"at", "keep"}:
        raise InputError(f"unknown key halving.{key}{nearest(str(key), ('at', 'keep'))}")
    at = _values("halving.at", given.get("at"))
    shares = tuple(number("halving.at", share) for share in at)
    return Halving(shares, number("halving.keep", given.get("keep", 0.5)))


def _axes(plain: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {key: _values(key, value) for key, value in plain.items()}


def _values(key: str, value: Any, least: int = 1) -> list[Any]:
    if not isinstance(value, list):
        raise InputError(f"{key} is a list of values, not {value!r}")
    if len(value) < least:
        raise InputError(f"{key} has no value")
    return value


def _flat(key: str, value: Any) -> dict[str, Any]:
    return {str(name).replace("-", "_"): each for name, each in flatten(_mapping(key, value))}


def _mapping(key: str, value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InputError(f"{key} is a mapping of keys to values, not {value!r}")
    return value


def _setting(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InputError(f"--set {text}: give KEY=VALUE, such as data.directory=data/c4")
    return key.replace("-", "_"), value


class _Texts(frozenset[str]):
    """The dotted names of keys whose values are text: what is one in a run's config is one in a study."""

    def __contains__(self, name: object) -> bool:
        section, _, key = str(name).partition(".")
        if section == "variants":
            key = key.partition(".")[2]
        return section in ("base", "run_dir") or key == "base" or key in flags.texts(RunConfig)
