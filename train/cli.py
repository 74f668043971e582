"""`mora`: the one command line. Each subcommand is a frozen dataclass of flags and a function of it."""

import dataclasses
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from mora_jax.errors import InputError
from mora_jax.llama import LlamaConfig
from mora_jax.methods import MoRA
from train import exits, flags
from train.bench import options
from train.bench.options import BenchData, BenchProfile, BenchReport, BenchStep, BenchSweep
from train.config import RunConfig
from train.sections import Evaluation

Config = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CONFIG")]
Folder = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")]
Out = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]


@dataclasses.dataclass(frozen=True)
class PrepareData:
    """C4-format shards into a data set of token rows.

    Attributes:
      source: training text: a glob or folder of .json.gz shards (any etils.epath path), or tfds:NAME for a
        data set that TFDS has prepared (tfds:c4/en, or tfds:/path/to/it).
      validation: validation text, likewise; not used with tfds:, whose own validation split is taken.
      tokenizer: SentencePiece model file.
      out: folder of the data set.
      sequence_length: tokens of a row.
      skip_lines: bad lines (not JSON, no text) to skip before giving up.
      workers: processes; 0 for one a core.
      tfds_data_dir: where TFDS keeps its data sets; empty for its default.
    """

    source: str
    tokenizer: str
    out: str
    validation: str = ""
    sequence_length: int = 512
    skip_lines: int = 0
    workers: int = 0
    tfds_data_dir: str = ""


@dataclasses.dataclass(frozen=True)
class TrainTokenizer:
    """Trains a SentencePiece BPE model with byte fallback.

    Attributes:
      source: text: a glob or folder of C4-format shards.
      out: the model file to write, ending in .model.
      vocab_size: pieces.
      max_documents: documents to train on, at most.
    """

    source: str
    out: str
    vocab_size: int = 32_000
    max_documents: int = 1_000_000


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """Pretrains a model as a config file says, or goes on with it; every scalar of it is also a flag.

    Attributes:
      config: YAML file, such as configs/demo.yaml.
      resume: go on with the run that the folder holds, if it holds one; with --no-resume it is refused.
      dry_run: show shapes, trainable and frozen parameters, tokens and steps, and stop.
    """

    config: Config
    run: Annotated[RunConfig, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
    resume: bool = True
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a config needs of each TPU or GPU, found by compiling its training step here, without any of them.

    Every scalar of the config is also a flag. Exits with status 1 where it does not fit.

    Attributes:
      config: YAML file, such as configs/1_3b_remora.yaml.
      topology: slice of TPUs to compile for with the TPU compiler, such as v5e:16x16; empty for none.
      devices: GPUs to plan for instead, simulated by as many CPU devices; 0 for none.
      memory: GiB of one such GPU.
      every_program: compile the restart and the evaluation too, not only the training step.
      out: JSON file for all figures, in bytes; empty for none.
    """

    config: Config
    run: Annotated[RunConfig, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
    topology: str = ""
    devices: int = 0
    memory: float = 80.0
    every_program: tyro.conf.FlagCreatePairsOff[bool] = False
    out: str = ""


@dataclasses.dataclass(frozen=True)
class PlanTable:
    """Plans of several configs on several slices of TPUs as one table in Markdown.

    Each config is divided over all chips of a slice, with layers recomputed and splash attention.

    Attributes:
      configs: YAML files.
      topologies: slices of TPUs, such as v5e:2x4 v5e:16x16.
      sequences: of a microbatch on one chip, at most.
      out: JSON file that keeps every plan: what is in it is not compiled again.
      state_only: compile nothing: of what is not in the file, show the sizes of the state and the formula.
    """

    configs: tuple[str, ...]
    topologies: tuple[str, ...]
    sequences: int = 4
    out: str = "plans.json"
    state_only: tyro.conf.FlagCreatePairsOff[bool] = False


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Validation perplexity of a run or of an exported model.

    Attributes:
      path: folder of a run, or Hugging Face folder.
      data: data set to evaluate on; empty for the run's own.
      batch_size: sequences a batch.
      max_batches: batches to read; 0 for the whole split.
      dtype: type of products.
    """

    path: Folder
    data: str = ""
    batch_size: int = 64
    max_batches: int = 0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"


@dataclasses.dataclass(frozen=True)
class Export:
    """A run's merged weights and tokenizer as a Hugging Face folder.

    Attributes:
      run_dir: folder of the run.
      out: folder to write.
      dtype: type of the stored weights.
    """

    run_dir: Folder
    out: Out
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True)
class ListCheckpoints:
    """A run's checkpoints, each verified against its manifest; exits with status 4 if one is damaged.

    Attributes:
      run_dir: folder of the run, which may be training.
      no_verify: only list them; reading every file takes a while where they are large.
    """

    run_dir: Folder
    no_verify: tyro.conf.FlagCreatePairsOff[bool] = False


@dataclasses.dataclass(frozen=True)
class SurveyMethods:
    """A table of methods and operators for a model: trainable parameters, r_hat, attainable rank.

    Attributes:
      rank: LoRA's rank, and the one whose parameter count MoRA matches.
      model: the model whose seven linears are adapted.
    """

    rank: int = 128
    model: Annotated[LlamaConfig, tyro.conf.FlagConversionOff] = dataclasses.field(
        default_factory=LlamaConfig
    )

    def __post_init__(self) -> None:
        MoRA(self.rank)  # refuses a rank that is none


@dataclasses.dataclass(frozen=True)
class Demo:
    """The whole path on text of this Python installation: gather, tokenize, prepare, pretrain, export.

    Attributes:
      config: the run's config.
      folder: where its data and its run are written; what is there is replaced.
    """

    config: str = "configs/demo.yaml"
    folder: str = "runs/demo"


def prepare_data(command: PrepareData) -> None:
    """Runs `mora prepare-data`."""
    from train.data.builder import prepare

    info = prepare(**dataclasses.asdict(command))
    counts = (f"{split} {info.rows[split]:,} rows, {info.tokens[split]:,} tokens" for split in info.rows)
    print(f"{command.out}: {'; '.join(counts)}")


def train_tokenizer(command: TrainTokenizer) -> None:
    """Runs `mora train-tokenizer`."""
    from train.data.tokenizer import train_tokenizer as train

    made = train(command.source, command.out, command.vocab_size, command.max_documents)
    print(f"{made.path}: {made.vocab_size:,} pieces")


def pretrain(command: Pretrain) -> None:
    """Runs `mora pretrain`."""
    if command.dry_run:
        from train.describe import print_description

        print_description(command.run)
    else:
        train(command)


def train(command: Pretrain) -> None:
    """Trains, as one of several processes where it is so."""
    import jax

    from train.distributed import joined
    from train.loop import pretrain as run

    with joined(command.run.distributed, explain):
        summary = run(command.run, command.resume)
        if jax.process_index() == 0:
            print_summary(summary, command.run.run_dir)


def plan(command: Plan) -> None:
    """Runs `mora plan`."""
    from train.plan.report import plan as make
    from train.plan.report import show

    programs = ["train", *(["restart"] if command.run.restart.every else []), "eval"]
    programs = programs if command.every_program else programs[:1]
    made = make(command.run, command.topology, command.devices, command.memory, programs)
    show(made, command.config, command.out)
    if made.fits() is False:
        raise SystemExit(1)


def plan_table(command: PlanTable) -> None:
    """Runs `mora plan-table`."""
    from train.plan.table import make_table

    slices, compiling = command.topologies, not command.state_only
    print(make_table(command.configs, slices, command.sequences, command.out, compiling))


def evaluate(command: Evaluate) -> None:
    """Runs `mora evaluate`."""
    from train.scoring import score_path

    how = Evaluation(batch_size=command.batch_size, max_batches=command.max_batches)
    score = score_path(command.path, command.data, how, command.dtype)
    print_summary({"validation_loss": score.loss, "validation_perplexity": score.perplexity}, command.path)


def export(command: Export) -> None:
    """Runs `mora export`."""
    from train.export import export as write

    write(command.run_dir, command.out, command.dtype)
    print(f"written: {command.out}")


def list_checkpoints(command: ListCheckpoints) -> None:
    """Runs `mora checkpoints`."""
    from train.inventory import print_inventory

    if not print_inventory(command.run_dir, not command.no_verify):
        raise SystemExit(exits.DAMAGED)


def survey_methods(command: SurveyMethods) -> None:
    """Runs `mora methods`."""
    from train.survey import print_survey

    print_survey(command.model, command.rank)


def bench_data(command: BenchData) -> None:
    """Runs `mora bench data`."""
    from train.bench.data import bench

    bench(command.source, command.tokenizer, command.sequence_length, command.batch_size, command.out)


def bench_profile(command: BenchProfile) -> None:
    """Runs `mora bench profile`."""
    from train.bench.profile import bench

    case = options.case_of(command)
    bench(case, command.method, command.profiled_steps, command.top, command.out)


def bench_step(command: BenchStep) -> None:
    """Runs `mora bench step`."""
    from train.bench.step import bench

    bench(options.case_of(command), command)


def bench_sweep(command: BenchSweep) -> None:
    """Runs `mora bench sweep`."""
    from train.bench.sweep import bench

    bench(options.case_of(command), command)


def bench_report(command: BenchReport) -> None:
    """Runs `mora bench report`."""
    from train.bench.report import refresh

    print(f"{command.page}: {refresh(command.page)} tables written")


def demo(command: Demo) -> None:
    """Runs `mora demo`."""
    from train.demo import demo as run

    run(command.config, command.folder)


# Functions import what they run only then, so that `mora --help` answers at once.
COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "prepare-data": (PrepareData, prepare_data),
    "train-tokenizer": (TrainTokenizer, train_tokenizer),
    "pretrain": (Pretrain, pretrain),
    "plan": (Plan, plan),
    "plan-table": (PlanTable, plan_table),
    "evaluate": (Evaluate, evaluate),
    "checkpoints": (ListCheckpoints, list_checkpoints),
    "export": (Export, export),
    "methods": (SurveyMethods, survey_methods),
    "bench data": (BenchData, bench_data),
    "bench step": (BenchStep, bench_step),
    "bench profile": (BenchProfile, bench_profile),
    "bench sweep": (BenchSweep, bench_sweep),
    "bench report": (BenchReport, bench_report),
    "demo": (Demo, demo),
}


def main(args: Sequence[str] | None = None) -> None:
    """Runs one command. What ends it early is one line on stderr and a status of `train.exits`."""
    try:
        run(sys.argv[1:] if args is None else list(args))
    except (InputError, exits.Stopped, OSError, KeyboardInterrupt) as error:
        raise SystemExit(explain(error)) from None


def explain(error: BaseException) -> int:
    """Says in one line on stderr what ended a command, or shows where a bug is; the status to exit with."""
    match error:
        case SystemExit():
            return error.code if isinstance(error.code, int) else bool(error.code)
        case InputError():
            line, status = str(error), exits.BAD_INPUT
        case exits.Stopped():
            line, status = str(error), error.status
        case OSError():
            line = f"{error.filename or 'input or output'}: {error.strerror or error}"
            status = exits.DISK
        case KeyboardInterrupt():
            line, status = "interrupted", exits.INTERRUPTED
        case _:
            traceback.print_exception(error)
            return exits.BUG
    print(f"mora: {line}", file=sys.stderr)
    return status


def run(args: list[str]) -> None:
    """Finds the command, builds its flags and calls it. Raises InputError for an unknown one."""
    if not args or args[0] in ("-h", "--help"):
        return print_commands()
    words = 2 if args[0] == "bench" else 1
    name, rest = " ".join(args[:words]), args[words:]
    if name not in COMMANDS:
        raise InputError(
            f"there is no command {name!r}{flags.nearest(name, COMMANDS)} (mora --help lists them)"
        )
    command, function = COMMANDS[name]
    if command in (Pretrain, Plan) and not {"-h", "--help"} & set(rest[:1]):
        return function(read_with_config(command, name, rest))
    if command in (BenchProfile, BenchStep, BenchSweep):
        return function(options.read(command, rest, f"mora {name}"))
    return function(flags.parse(command, rest, f"mora {name}"))


def read_with_config(command: type, name: str, args: list[str]) -> Any:
    """`mora NAME CONFIG ...`: the file's values as flags ahead of the user's.

    Raises:
      InputError: naming what is wrong, also where the file does not come first.
    """
    if not args or args[0].startswith("-"):
        raise InputError(f"mora {name} needs a config file first: mora {name} CONFIG [flags]")
    words, rules = flags.words_of_yaml(args[0])
    default = command(args[0], RunConfig(rules=rules))
    return flags.parse(command, [args[0], *words, *args[1:]], f"mora {name}", default)


def print_commands() -> None:
    """The list of commands, one line each."""
    table = Table.grid(padding=(0, 2))
    for name, (command, _) in COMMANDS.items():
        table.add_row(f"mora {name}", (command.__doc__ or "").splitlines()[0])
    Console().print("MoRA and ReMoRA pretraining in JAX. `mora COMMAND --help` explains a command.\n", table)


def print_summary(summary: dict[str, Any], title: str) -> None:
    """A short table of figures."""
    table = Table("", "", title=title, show_header=False)
    for name, value in summary.items():
        table.add_row(name.replace("_", " "), _readable(value))
    Console().print(table)


def _readable(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    main()
