"""`mora bench ...`: the functions of its commands."""

from train.cli.explain import explain
from train.perf.bench.options import BenchData, BenchProfile, BenchReport, BenchScaling, BenchStep, BenchSweep
from train.storage.files import check_free


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
    from train.perf.bench import together

    together.bench_step(command.to_case(), command, explain)


def bench_sweep(command: BenchSweep) -> None:
    """Runs `mora bench sweep`."""
    from train.perf.bench.sweep import bench

    check_free(command.picture, "--picture", command.overwrite, ".png")
    bench(command.to_case(), command)


def bench_scaling(command: BenchScaling) -> None:
    """Runs `mora bench scaling`."""
    from train.perf.bench.scaling import bench

    check_free(command.picture, "--picture", command.overwrite, ".png")
    bench(command.to_case(), command)


def bench_report(command: BenchReport) -> None:
    """Runs `mora bench report`."""
    from train.perf.bench.report import refresh

    print(f"{command.page}: {refresh(command.page)} tables written")
