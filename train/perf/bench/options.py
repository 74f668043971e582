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

    def refuse_mesh(self, where: str) -> None:
        """Raises InputError if the flags ask for a mesh of several devices."""
        sizes = dataclasses.asdict(self.run.mesh)
        if wide := sorted(f"--mesh.{axis} {size}" for axis, size in sizes.items() if size > 1):
            raise InputError(f"this benchmark computes on one device, not with {', '.join(wide)}; {where}")

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
      profiled_steps: steps under the profiler on a mesh of several devices, to see what communication costs;
        0 for none.
      no_check: do not compare the paths with the formula before timing.
      missing: measure only the rows that the file of figures lacks.
      peer_timeout: seconds that one peer may take.
    """

    peers: tuple[str, ...] = ("none",)
    profiled_steps: int = 3
    no_check: tyro.conf.FlagCreatePairsOff[bool] = False
    missing: tyro.conf.FlagCreatePairsOff[bool] = False
    peer_timeout: float = 420.0

    def __post_init__(self) -> None:
        super().__post_init__()
        above("--peer-timeout", self.peer_timeout, 0)
        at_least("--profiled-steps", self.profiled_steps, 0)


@dataclasses.dataclass(frozen=True)
class BenchScaling(TimedSteps):
    """Training steps on meshes of several devices beside one device, all in one run.

    The batch of the case is that of one device. `data` and `fsdp` multiply it, so that each device keeps its
    tokens; `tensor` does not.

    Attributes:
      meshes: meshes to measure, AXIS:SIZE joined by +, such as data:4, fsdp:4, data:2+fsdp:2; all for data,
        fsdp and tensor of 2, 4 and so on, and data with fsdp of 2 each, up to --devices.
      devices: the largest mesh of all; 0 for all devices that are here.
      flags: sets of XLA's flags to compare, each a word NAME=VALUE,NAME=VALUE without leading dashes; none
        for no flag. Every mesh is measured with each set.
      profiled_steps: steps under the profiler, to see what communication costs; 0 for none.
      compilers: programs compiled at a time.
      row_timeout: seconds that one row may take; with several compilers, the first compiles all.
      no_baseline: do not measure one device, as for a model that it cannot hold.
      picture: PNG file; empty for none.
      overwrite: replace the file of --picture if there is one; otherwise it is an error.
    """

    methods: tuple[str, ...] = ("mora",)
    timed_steps: int = 20
    warmup_steps: int = 3
    meshes: tuple[str, ...] = ("all",)
    devices: int = 0
    flags: tuple[str, ...] = ("none",)
    profiled_steps: int = 3
    compilers: int = 1
    row_timeout: float = 600.0
    no_baseline: tyro.conf.FlagCreatePairsOff[bool] = False
    picture: str = ""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        spell_out(self, "--", optional=("picture",))
        self.refuse_mesh("give meshes as --meshes")
        at_least("--devices", self.devices, 0)
        at_least("--profiled-steps", self.profiled_steps, 0)
        at_least("--compilers", self.compilers, 1)
        above("--row-timeout", self.row_timeout, 0)


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
        self.refuse_mesh("give 1 there, and measure a mesh with mora bench step")


@dataclasses.dataclass(frozen=True)
class BenchProfile(OfCase):
    """The most expensive kernels of a training step, on a mesh the mean of its devices. --out gets all.

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
