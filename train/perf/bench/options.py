"""The flags of the benchmarks. Those that take a model have every flag of a run's config beside their own."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

import tyro

from mora_jax.errors import InputError
from train.config import flags
from train.config.run import RunConfig
from train.config.sections import above, at_least
from train.perf.bench.cases import SIZES, Case

CaseName = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CASE")]
Run = Annotated[RunConfig, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
C = TypeVar("C")


@dataclasses.dataclass(frozen=True)
class BenchData:
    """Tokens a second prepared and read.

    Attributes:
      source: C4-format shards to measure on.
      tokenizer: SentencePiece model file.
      sequence_length: tokens of a row.
      batch_size: rows of a batch that is read.
      out: JSON file for the figures; empty for none.
    """

    source: str
    tokenizer: str
    sequence_length: int = 512
    batch_size: int = 128
    out: str = ""


@dataclasses.dataclass(frozen=True)
class BenchProfile:
    """The costliest kernels of a training step.

    Attributes:
      case: 250m, 1.3b, 7b (the paper's Table 5), tiny, or a config file.
      base_dtype: type that the frozen parameters are held in.
      method: what is trained: NAME[-OPERATOR][:RANK][/PATH], such as mora, mora-rotate:8, lora:128/merged,
        full, frozen; config for what a config file says.
      profiled_steps: steps to profile.
      top: kernels to print.
      out: JSON file for all kernels; empty for none.
    """

    case: CaseName
    run: Run
    base_dtype: Literal["float32", "bfloat16"] = "float32"
    method: str = "mora"
    profiled_steps: int = 3
    top: int = 10
    out: str = ""


@dataclasses.dataclass(frozen=True)
class BenchStep:
    """Training steps side by side: methods, and PyTorch programs as peers.

    Attributes:
      case: 250m, 1.3b, 7b (the paper's Table 5), tiny, or a config file.
      base_dtype: type that the frozen parameters are held in.
      methods: what is trained: NAME[-OPERATOR][:RANK][/PATH], such as full, frozen, mora, mora-rotate:8,
        lora:128/merged; config for what a config file says; all for the case's list, none for none.
      peers: PyTorch programs, METHOD[:RANK][/compiled][-bf16], such as lora, lora:128/compiled,
        mora/compiled-bf16; all for the case's list, none for none.
      warmup_steps: steps before those that are timed.
      timed_steps: steps that are timed.
      no_check: do not compare the paths with the formula first.
      missing: measure only what the file of figures lacks.
      minutes: begin no row that is likely to end later than this, in minutes; 0 for no limit.
      peer_timeout: seconds that one peer may take.
      out: JSON file for the figures; those of one case may be measured one by one; empty for none.
    """

    case: CaseName
    run: Run
    base_dtype: Literal["float32", "bfloat16"] = "float32"
    methods: tuple[str, ...] = ("all",)
    peers: tuple[str, ...] = ("none",)
    warmup_steps: int = 5
    timed_steps: int = 40
    no_check: tyro.conf.FlagCreatePairsOff[bool] = False
    missing: tyro.conf.FlagCreatePairsOff[bool] = False
    minutes: float = 0.0
    peer_timeout: float = 420.0
    out: str = ""

    def __post_init__(self) -> None:
        at_least("warmup_steps", self.warmup_steps, 1)
        at_least("timed_steps", self.timed_steps, 2)
        at_least("minutes", self.minutes, 0)
        above("peer_timeout", self.peer_timeout, 0)


@dataclasses.dataclass(frozen=True)
class BenchSweep:
    """How time and memory of a step grow with batch, sequence, rank and width.

    Attributes:
      case: 250m, 1.3b, 7b (the paper's Table 5), tiny, or a config file.
      base_dtype: type that the frozen parameters are held in.
      methods: what is trained, as in mora bench step.
      axes: what is varied around the case, one at a time.
      warmup_steps: steps before those that are timed.
      timed_steps: steps that are timed.
      minutes: begin no point that is likely to end later than this, in minutes; 0 for no limit. The same
        command goes on with the points that the file lacks.
      out: JSON file for the figures; empty for none.
      picture: PNG file; empty for none.
    """

    case: CaseName
    run: Run
    base_dtype: Literal["float32", "bfloat16"] = "float32"
    methods: tuple[str, ...] = ("frozen", "lora/activation", "lora/merged", "mora")
    axes: tuple[Literal["batch", "sequence", "rank", "width"], ...] = ("batch", "sequence", "rank", "width")
    warmup_steps: int = 3
    timed_steps: int = 10
    minutes: float = 0.0
    out: str = ""
    picture: str = ""

    def __post_init__(self) -> None:
        at_least("warmup_steps", self.warmup_steps, 1)
        at_least("timed_steps", self.timed_steps, 2)
        at_least("minutes", self.minutes, 0)


@dataclasses.dataclass(frozen=True)
class BenchReport:
    """Writes the tables of a Markdown page anew from the figures of mora bench step.

    Attributes:
      page: Markdown file with <!-- figures: FILE.json --> ... <!-- end -->, FILE named from its folder.
    """

    page: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PAGE")] = "docs/performance.md"


def case_of(command: "BenchProfile | BenchStep | BenchSweep") -> Case:
    """What the flags say is measured."""
    known = SIZES[command.case]() if command.case in SIZES else Case(command.case, command.run)
    return dataclasses.replace(known, config=command.run, base_dtype=command.base_dtype)


def read(command: type[C], args: Sequence[str], name: str) -> C:
    """`mora bench ... CASE [flags]`: the case's values, and the user's flags over them.

    Raises:
      InputError: naming what is wrong, also where no case comes first.
    """
    if set(args) & {"-h", "--help"}:
        known = SIZES[args[0]]() if args[0] in SIZES else Case("CASE", RunConfig())
        return flags.parse(command, ["--help"], name, _default(command, known.name, known))
    if not args or args[0].startswith("-"):
        raise InputError(f"{name} needs a case first: {', '.join(SIZES)} or a config file")
    if args[0] in SIZES:
        return flags.parse(command, args, name, _default(command, args[0], SIZES[args[0]]()))
    words, rules = flags.words_of_yaml(args[0])
    default = _default(command, args[0], Case(args[0], RunConfig(rules=rules)))
    return flags.parse(command, [args[0], *words, *args[1:]], name, default)


def _default(command: type[C], name: str, case: Case) -> Any:
    return command(case=name, run=case.config, base_dtype=case.base_dtype)  # pyright: ignore[reportCallIssue]
