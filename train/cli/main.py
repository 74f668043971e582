"""The command line `mora`. Each command is a frozen dataclass of flags and a function of it."""

import contextlib
import errno
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.table import Table

from mora_jax.errors import InputError, nearest, spelled_out
from train.cli.commands import (
    Demo,
    Evaluate,
    Export,
    Generate,
    ListCheckpoints,
    Merge,
    Plan,
    PlanTable,
    Plot,
    PrepareData,
    Pretrain,
    SurveyMethods,
    TrainTokenizer,
)
from train.config import flags
from train.config.sections import Evaluation
from train.console import exits, streams
from train.console.terminal import console, one_line_warnings
from train.perf.bench import options
from train.perf.bench.options import BenchData, BenchProfile, BenchReport, BenchStep, BenchSweep
from train.storage import buckets
from train.storage.files import check_free, is_bad_place


def prepare_data(command: PrepareData) -> None:
    """Runs `mora prepare-data`."""
    from train.data.rows.build import prepare

    info = prepare(
        command.source,
        command.validation,
        command.tokenizer,
        command.sequence_length,
        command.out,
        skip_lines=command.skip_lines,
        workers=command.workers,
        tfds_data_dir=command.tfds_data_dir,
        text_key=command.text_key,
        bos=command.bos,
        eos=command.eos,
    )
    counts = (f"{split} {info.rows[split]:,} rows, {info.tokens[split]:,} tokens" for split in info.rows)
    print(f"{command.out}: {'; '.join(counts)}")


def train_tokenizer(command: TrainTokenizer) -> None:
    """Runs `mora train-tokenizer`."""
    from train.data.tokenizer import train_tokenizer as train

    made = train(
        command.source,
        command.out,
        command.vocab_size,
        command.max_documents,
        overwrite=command.overwrite,
        key=command.text_key,
    )
    print(f"{made.path}: {made.vocab_size:,} pieces")


def pretrain(command: Pretrain) -> None:
    """Runs `mora pretrain`."""
    if command.dry_run:
        from train.cli.describe import print_description

        print_description(command.run)
    else:
        train(command)


def train(command: Pretrain) -> None:
    """Trains, possibly as one of several processes."""
    import jax

    from train.jobs.pretrain import pretrain as run
    from train.runtime.distributed import joined
    from train.runtime.preempt import ended_at_once

    with ended_at_once(), joined(command.run.distributed, explain):
        summary = run(command.run, command.resume)
        if jax.process_index() == 0:
            print_summary(summary, command.run.run_dir)


def plan(command: Plan) -> None:
    """Runs `mora plan`."""
    from train.perf.plan.report import plan as make
    from train.perf.plan.report import show

    check_free(command.out, "--out", command.overwrite)
    programs = ["train", *(["restart"] if command.run.restart.every else []), "eval"]
    programs = programs if command.every_program else programs[:1]
    made = make(command.run, command.topology, command.devices, command.memory, programs)
    show(made, command.config, command.out)
    if made.fits() is False:
        raise SystemExit(1)


def plan_table(command: PlanTable) -> None:
    """Runs `mora plan-table`."""
    from train.perf.plan.table import make_table

    slices, compiling = command.topologies, not command.state_only
    print(make_table(command.configs, slices, command.sequences, command.out, compiling))


def evaluate(command: Evaluate) -> None:
    """Runs `mora evaluate`."""
    from train.jobs.score import score_path

    how = Evaluation(batch_size=command.batch_size, max_batches=command.max_batches)
    score = score_path(command.path, command.data, how, command.dtype)
    print_summary({"validation_loss": score.loss, "validation_perplexity": score.perplexity}, command.path)


def generate(command: Generate) -> None:
    """Runs `mora generate`."""
    from train.cli.generate import run

    check_free(command.out, "--out", command.overwrite)
    run(command)


def export(command: Export) -> None:
    """Runs `mora export`."""
    command.check()
    if command.adapter:
        export_adapter(command)
    else:
        export_merged(command)


def export_merged(command: Export) -> None:
    """Runs `mora export` without --adapter."""
    from train.jobs.export import export as write

    write(command.run_dir, command.out, command.dtype)
    print(f"written: {command.out}")


def export_adapter(command: Export) -> None:
    """Runs `mora export --adapter`."""
    from train.console.terminal import warn
    from train.jobs.adapter import AdapterOptions, advice, size_of
    from train.jobs.adapter import export_adapter as write

    how = AdapterOptions(command.dtype, command.format, command.pad_rank, command.with_base)
    said = write(command.run_dir, command.out, how)
    warn(advice(said))
    for folder in filter(None, (command.out, command.with_base)):
        print(f"written: {folder} ({size_of(folder) / 1e6:,.1f} MB)")


def merge(command: Merge) -> None:
    """Runs `mora merge`."""
    from train.jobs.adapter import merge_adapters

    dtype = None if command.dtype == "base" else command.dtype
    base, adapters, out = command.parts()
    count = merge_adapters(base, adapters, out, dtype)
    print(f"written: {out} ({count} tensors changed)")


def list_checkpoints(command: ListCheckpoints) -> None:
    """Runs `mora checkpoints`."""
    import jax

    from train.run.inventory import print_inventory

    jax.config.update("jax_platforms", "cpu")  # the run may be using the GPU
    if not print_inventory(command.run_dir, not command.no_verify):
        raise SystemExit(exits.DAMAGED)


def plot(command: Plot) -> None:
    """Runs `mora plot`."""
    from train.jobs.plot import draw_runs

    print(f"written: {draw_runs(command.runs, command.out, command.overwrite)}")


def survey_methods(command: SurveyMethods) -> None:
    """Runs `mora methods`."""
    from train.cli.methods import print_survey

    print_survey(command.model, command.rank)


def bench_data(command: BenchData) -> None:
    """Runs `mora bench data`."""
    from train.perf.bench.data import bench

    check_free(command.out, "--out", command.overwrite)
    bench(command.source, command.tokenizer, command.sequence_length, command.batch_size, command.out)


def bench_profile(command: BenchProfile) -> None:
    """Runs `mora bench profile`."""
    from train.perf.bench.profile import bench

    check_free(command.out, "--out", command.overwrite)
    case = command.to_case()
    bench(case, command.method, command.profiled_steps, command.top, command.out)


def bench_step(command: BenchStep) -> None:
    """Runs `mora bench step`."""
    from train.perf.bench.step import bench

    bench(command.to_case(), command)


def bench_sweep(command: BenchSweep) -> None:
    """Runs `mora bench sweep`."""
    from train.perf.bench.sweep import bench

    check_free(command.picture, "--picture", command.overwrite)
    bench(command.to_case(), command)


def bench_report(command: BenchReport) -> None:
    """Runs `mora bench report`."""
    from train.perf.bench.report import refresh

    print(f"{command.page}: {refresh(command.page)} tables written")


def demo(command: Demo) -> None:
    """Runs `mora demo`."""
    from train.cli.demo import demo as run

    run(command.config, command.folder)


# Commands that print a log and write their results to files. All others print their result.
_WORK = ("prepare-data", "train-tokenizer", "pretrain", "export", "merge", "demo")

# The functions import what they run, so that `mora --help` is quick.
COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "prepare-data": (PrepareData, prepare_data),
    "train-tokenizer": (TrainTokenizer, train_tokenizer),
    "pretrain": (Pretrain, pretrain),
    "plan": (Plan, plan),
    "plan-table": (PlanTable, plan_table),
    "evaluate": (Evaluate, evaluate),
    "generate": (Generate, generate),
    "checkpoints": (ListCheckpoints, list_checkpoints),
    "export": (Export, export),
    "merge": (Merge, merge),
    "plot": (Plot, plot),
    "methods": (SurveyMethods, survey_methods),
    "bench data": (BenchData, bench_data),
    "bench step": (BenchStep, bench_step),
    "bench profile": (BenchProfile, bench_profile),
    "bench sweep": (BenchSweep, bench_sweep),
    "bench report": (BenchReport, bench_report),
    "demo": (Demo, demo),
}


def main(args: Sequence[str] | None = None) -> None:
    """Runs one command. Errors become one line on stderr and an exit status of `train.console.exits`."""
    words = sys.argv[1:] if args is None else list(args)
    buckets.configure()
    with streams.lossy_output(result=not set(words[:1]) & set(_WORK)), one_line_warnings():
        try:
            with interruptible(ends=args is None):
                run(words)
                sys.stdout.flush()
        except (Exception, KeyboardInterrupt) as error:
            raise SystemExit(explain(error)) from None


@contextlib.contextmanager
def interruptible(ends: bool) -> Iterator[None]:
    """Ignores Ctrl-C after the block if the program `ends` there: it could not stop anything any more.

    Python would die of the signal, without a line and with another status than that of the command.
    """
    try:
        yield
    finally:
        if ends:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def explain(error: BaseException) -> int:
    """Prints an error as one line on stderr, or a bug as its traceback. Returns the exit status."""
    match error:
        case SystemExit():
            return error.code if isinstance(error.code, int) else bool(error.code)
        case InputError():
            line, status = str(error), exits.BAD_INPUT
        case exits.Stopped():
            line, status = str(error), error.status
        case OSError() if error.errno != errno.ENOMEM:
            line = f"{error.filename or 'input or output'}: {error.strerror or error}"
            status = exits.BAD_INPUT if is_bad_place(error) else exits.DISK
        case KeyboardInterrupt():
            line, status = "interrupted", exits.INTERRUPTED
        case _ if line := buckets.describe_error(error):
            status = exits.BAD_INPUT if isinstance(error, ImportError) else exits.DISK
        case _ if found := _exhausted(error):
            line, status = found, exits.MEMORY
        case _:
            traceback.print_exception(error)
            return exits.BUG
    print(f"mora: {line}", file=sys.stderr)
    return status


def _exhausted(error: BaseException) -> str | None:
    """Returns a line on memory that ran out, None for any other error."""
    from train.runtime import memory  # imports JAX

    found = memory.exhausted(error)
    return memory.describe(found) if found else None


def run(args: list[str]) -> None:
    """Parses the flags of a command and runs it. Raises InputError for an unknown command."""
    if not args or args[0] in ("-h", "--help"):
        return print_commands()
    if args[0] == "--version":
        return print_version()
    words = 2 if args[0] == "bench" else 1
    name, rest = " ".join(args[:words]), args[words:]
    if name not in COMMANDS:
        raise InputError(f"there is no command {name!r}{nearest(name, COMMANDS)} (mora --help lists them)")
    command, function = COMMANDS[name]
    if command in (Pretrain, Plan) and not {"-h", "--help"} & set(rest[:1]):
        return function(read_with_config(command, name, rest))
    if command in (BenchProfile, BenchStep, BenchSweep):
        return function(options.read(command, rest, f"mora {name}"))
    return function(flags.parse(command, rest, f"mora {name}"))


def read_with_config(command: type, name: str, args: list[str]) -> Any:
    """Returns the command of `mora NAME CONFIG [flags]`. Flags override the file's values.

    Raises:
      InputError: for bad values, and if the file does not come first.
    """
    if not args or args[0].startswith("-"):
        raise InputError(f"mora {name} needs a config file first: mora {name} CONFIG [flags]")
    file = flags.read_file(args[0])
    return flags.parse(command, args, f"mora {name}", command(args[0], file.config), file)


def print_version() -> None:
    """Prints the version, and the format of runs and data sets."""
    import importlib.metadata

    from train.storage.format import FORMAT

    print(f"mora {importlib.metadata.version('mora_jax')}, format {FORMAT}")


def print_commands() -> None:
    """Prints the list of commands, one line each."""
    table = Table.grid(padding=(0, 2))
    for name, (command, _) in COMMANDS.items():
        table.add_row(f"mora {name}", (command.__doc__ or "").splitlines()[0])
    console().print("MoRA and ReMoRA pretraining in JAX. `mora COMMAND --help` explains a command.\n", table)


def print_summary(summary: dict[str, Any], title: str) -> None:
    """Prints a short table of figures. Control characters in it are escaped."""
    table = Table("", "", title=spelled_out(title), show_header=False)
    for name, value in summary.items():
        table.add_row(spelled_out(name.replace("_", " ")), spelled_out(_readable(value)))
    console().print(table)


def _readable(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    main()
