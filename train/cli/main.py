"""The command line `mora`. Each command is a frozen dataclass of flags and a function of it."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.table import Table

from mora_jax.errors import InputError, nearest
from train.cli.commands import bench, data, generate, harness, models, runs, study, tasks, training
from train.cli.explain import explain
from train.config import flags
from train.console import streams
from train.console.terminal import console, one_line_warnings
from train.perf.bench import options
from train.perf.bench.options import BenchData, BenchProfile, BenchReport, BenchScaling, BenchStep, BenchSweep
from train.storage import buckets

# Commands that print a log and write their results to files. All others print their result.
_WORK = ("prepare-data", "train-tokenizer", "pretrain", "finetune", "export", "merge", "demo")

# First words of commands of two words.
_GROUPS = ("bench", "task")

# The functions import what they run, so that `mora --help` is quick.
COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "prepare-data": (data.PrepareData, data.prepare_data),
    "show-data": (data.ShowData, data.show_data),
    "train-tokenizer": (data.TrainTokenizer, data.train_tokenizer),
    "pretrain": (training.Pretrain, training.pretrain),
    "finetune": (training.Finetune, training.finetune),
    "study": (study.RunStudy, study.run_study),
    "plan": (training.Plan, training.plan),
    "plan-table": (training.PlanTable, training.plan_table),
    "evaluate": (models.Evaluate, models.evaluate),
    "generate": (generate.Generate, generate.generate),
    "lm-eval": (harness.LmEval, harness.lm_eval),
    "checkpoints": (runs.ListCheckpoints, runs.list_checkpoints),
    "export": (models.Export, models.export),
    "merge": (models.Merge, models.merge),
    "plot": (runs.Plot, runs.plot),
    "spectrum": (runs.ShowSpectrum, runs.show_spectrum),
    "methods": (training.SurveyMethods, training.survey_methods),
    "bench data": (BenchData, bench.bench_data),
    "bench step": (BenchStep, bench.bench_step),
    "bench profile": (BenchProfile, bench.bench_profile),
    "bench sweep": (BenchSweep, bench.bench_sweep),
    "bench scaling": (BenchScaling, bench.bench_scaling),
    "bench report": (BenchReport, bench.bench_report),
    "task uuid-pairs": (tasks.UuidPairs, tasks.uuid_pairs),
    "task uuid-score": (tasks.UuidScore, tasks.uuid_score),
    "task uuid-plot": (tasks.UuidPlot, tasks.uuid_plot),
    "task reading": (tasks.Reading, tasks.reading),
    "demo": (training.Demo, training.demo),
}


def main(args: Sequence[str] | None = None) -> None:
    """Runs one command. Errors become one line on stderr and an exit status of `train.console.exits`."""
    words = sys.argv[1:] if args is None else list(args)
    buckets.configure()
    work = bool(set(words[:1]) & set(_WORK))
    # What work prints says that it is done: Ctrl-C must change nothing from then on.
    with streams.lossy_output(result=not work, held=work), one_line_warnings():
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


def run(args: list[str]) -> None:
    """Parses the flags of a command and runs it. Raises InputError for an unknown command."""
    if not args or args[0] in ("-h", "--help"):
        return print_commands()
    if args[0] == "--version":
        return print_version()
    words = 2 if args[0] in _GROUPS else 1
    name, rest = " ".join(args[:words]), args[words:]
    if name not in COMMANDS:
        raise InputError(f"there is no command {name!r}{nearest(name, COMMANDS)} (mora --help lists them)")
    command, function = COMMANDS[name]
    helped = bool({"-h", "--help"} & set(rest[:1]))
    if command in (training.Pretrain, training.Finetune, training.Plan) and not helped:
        return function(read_with_config(command, name, rest))
    if command in (BenchProfile, BenchScaling, BenchStep, BenchSweep):
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


if __name__ == "__main__":
    main()
