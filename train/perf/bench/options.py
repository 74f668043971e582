"""The flags of the benchmarks. Those that take a model also have every flag of a run's config."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal, TypeVar

import tyro

from mora_jax.errors import InputError
from train.config import flags
from train.config.paths import spell_out
from train.config.run import RunConfig
from train.config.sections import above, at_least
from train.perf.bench.cases import SIZES, Case


@dataclasses.dataclass(frozen=True)
class OfCase:
    """What every benchmark of a model takes.

    Attributes:
      case: 250m, 1.3b, 7b (the paper's Table 5), llama-3.2-1b, qwen-2.5-0.5b, tiny, or a config file.
      run: the case's config.
      out: JSON file for the figures; empty for none.
    """

    case: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CASE", help_behavior_hint="(required)")]
    run: Annotated[RunConfig, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
    out: str = ""

    def __post_init__(self) -> None:
        spell_out(self, "--", optional=("out",))
        wide = {
            f"--mesh.{axis} {size}" for axis, size in dataclasses.asdict(self.run.mesh).items() if size > 1
        }
        if wide:
            raise InputError(
                f"benchmarks compute on one device, not with {', '.join(sorted(wide))}; give 1 there, and "
                "measure a mesh with mora pretrain"
            )

    def to_case(self) -> Case:
        """Returns the case that the flags describe."""
        known = SIZES[self.case]() if self.case in SIZES else Case(self.case, self.run)
        return dataclasses.replace(known, config=self.run)


@dataclasses.dataclass(frozen=True)
class TimedSteps(OfCase):
    """What every benchmark that times steps takes.

    Attributes:
      methods: what is trained: NAME[-OPERATOR][:RANK][/PATH], such as full, frozen, mora, mora-rotate:8,
        lora:128/merged; config for the config file's own; all for the case's list, none for none.
      warmup_steps: steps before the timed ones.
      timed_steps: steps that are timed.
      minutes: start no measurement that is likely to end after this many minutes; 0 for no limit.
    """

    methods: tuple[str, ...] = ("all",)
    warmup_steps: int = 5
    timed_steps: int = 40
    minutes: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("--warmup-steps", self.warmup_steps, 1)
        at_least("--timed-steps", self.timed_steps, 2)
        at_least("--minutes", self.minutes, 0)


@dataclasses.dataclass(frozen=True)
class BenchStep(TimedSteps):
    """Training steps side by side: methods, and PyTorch programs as peers.

    With --out, the rows of one case can be measured one by one; the file keeps them all.

    Attributes:
      peers: PyTorch programs, METHOD[:RANK][/compiled][-bf16], such as lora, lora:128/compiled,
        mora/compiled-bf16; all for the case's list, none for none.
      no_check: do not compare the paths with the formula before timing.
      missing: measure only the rows that the file of figures lacks.
      peer_timeout: seconds that one peer may take.
    """

    peers: tuple[str, ...] = ("none",)
    no_check: tyro.conf.FlagCreatePairsOff[bool] = False
    missing: tyro.conf.FlagCreatePairsOff[bool] = False
    peer_timeout: float = 420.0

    def __post_init__(self) -> None:
        super().__post_init__()
        above("--peer-timeout", self.peer_timeout, 0)


@dataclasses.dataclass(frozen=True)
class BenchSweep(TimedSteps):
    """Time and memory of a step by batch, sequence length, rank and width.

    The same command with the same --out resumes: it measures only the points that the file lacks.

    Attributes:
      axes: sizes of the case to vary, one at a time.
      picture: PNG file; empty for none.
      overwrite: replace the file of --picture if there is one; otherwise it is an error.
    """

    methods: tuple[str, ...] = ("mora", "frozen", "lora/activation", "lora/merged")
    warmup_steps: int = 3
    timed_steps: int = 10
    axes: tuple[Literal["batch", "sequence", "rank", "width"], ...] = ("batch", "sequence", "rank", "width")
    picture: str = ""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        spell_out(self, "--", optional=("picture",))


@dataclasses.dataclass(frozen=True)
class BenchProfile(OfCase):
    """The most expensive kernels of a training step. --out gets all kernels.

    Attributes:
      method: what is trained: NAME[-OPERATOR][:RANK][/PATH], such as mora, mora-rotate:8, lora:128/merged,
        full, frozen; config for the config file's own.
      profiled_steps: steps to profile.
      top: number of kernels to print.
      overwrite: replace the file of --out if there is one; otherwise it is an error.
    """

    method: str = "mora"
    profiled_steps: int = 3
    top: int = 10
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False


@dataclasses.dataclass(frozen=True)
class BenchData:
    """Tokens a second prepared and read.

    Attributes:
      source: text to measure on, as of mora prepare-data.
      tokenizer: SentencePiece model, tokenizer.json, or a folder with one of them.
      sequence_length: tokens of a row.
      batch_size: rows of a batch that is read.
      out: JSON file for the figures; empty for none.
      overwrite: replace the file of --out if there is one; otherwise it is an error.
    """

    source: str
    tokenizer: str
    sequence_length: int = 512
    batch_size: int = 128
    out: str = ""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False

    def __post_init__(self) -> None:
        spell_out(self, "--", "source", "tokenizer", optional=("out",))


@dataclasses.dataclass(frozen=True)
class BenchReport:
    """Rewrites the tables of a Markdown page from the figures of mora bench step.

    Attributes:
      page: Markdown file with <!-- figures: FILE.json --> ... <!-- end -->; FILE is relative to its folder.
    """

    page: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PAGE")] = "docs/performance.md"

    def __post_init__(self) -> None:
        spell_out(self, "", "page")


C = TypeVar("C", bound=OfCase)


def read(command: type[C], args: Sequence[str], name: str) -> C:
    """Parses `mora bench ... CASE [flags]`: the case's values, overridden by the user's flags.

    Raises:
      InputError: for what is wrong, also if no case comes first.
    """
    if set(args[:1]) & {"-h", "--help"}:
        return flags.parse(command, ["--help"], name, _default(command, Case("CASE", RunConfig())))
    if not args or args[0].startswith("-"):
        raise InputError(f"{name} needs a case first: {', '.join(SIZES)} or a config file")
    if args[0] in SIZES:
        return flags.parse(command, args, name, _default(command, SIZES[args[0]]()))
    file = flags.read_file(args[0])
    return flags.parse(command, args, name, _default(command, Case(args[0], file.config)), file)


def _default(command: type[C], case: Case) -> C:
    return command(case=case.name, run=case.config)
