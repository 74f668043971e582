"""`mora bench profile`: the time of a training step, kernel by kernel."""

import collections
import dataclasses
import os
import re
import statistics
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData
from rich.table import Table

import mora_jax
from mora_jax import sharding
from mora_jax.io import json_text
from train.console.terminal import console
from train.perf.bench.cases import Case
from train.perf.bench.hlo import Op, kind_by_name, operations
from train.perf.bench.jobs import step_job
from train.perf.bench.program import Program, compile_step
from train.runtime import backend
from train.storage.files import write_result

# A graph launches many kernels at once and hides which operation each belongs to.
NO_GRAPHS = "--xla_gpu_enable_command_buffer="
# Folders of this project and of installed packages, left out of printed paths.
FOLDERS = (str(Path(mora_jax.__file__).parents[1]), str(Path(jax.__file__).parents[1]))


@dataclasses.dataclass(frozen=True)
class Kernel:
    """All runs of the kernels with one name for one operation, summed over the layers.

    Attributes:
      name: name without its number.
      op: the operation it computes.
      count: runs in a step.
      milliseconds: time in a step.
    """

    name: str
    op: Op
    count: float
    milliseconds: float


@dataclasses.dataclass(frozen=True)
class Profile:
    """The kernels of a step.

    Attributes:
      device: the accelerator or processor.
      step_milliseconds: median time of a step without the profiler.
      steps: profiled steps.
      kernels: the most expensive first.
    """

    device: str
    step_milliseconds: float
    steps: int
    kernels: list[Kernel]

    @property
    def busy_milliseconds(self) -> float:
        """The sum of the kernels' times in a step, as if no two ran at the same time."""
        return sum(kernel.milliseconds for kernel in self.kernels)

    def by(self, what: str) -> dict[str, float]:
        """Returns milliseconds in a step by an attribute of the operations, the largest first."""
        sums: dict[str, float] = collections.defaultdict(float)
        for kernel in self.kernels:
            sums[getattr(kernel.op, what)] += kernel.milliseconds
        return dict(sorted(sums.items(), key=lambda item: -item[1]))


def bench(case: Case, method: str, steps: int = 3, top: int = 10, out: str = "") -> Profile:
    """Profiles a few training steps and prints the most expensive kernels.

    Args:
      case: model and batch.
      method: what is trained, as `cases.with_method` parses it.
      steps: steps to profile.
      top: number of kernels to print.
      out: JSON file for all kernels; empty for none.

    Raises:
      InputError: as `cases.with_method` and `program.compile_step`.
    """
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {NO_GRAPHS}".strip()
    job = step_job(case, method, 0, steps)
    backend.set_flags(job.deterministic)  # before JAX starts
    program = compile_step(job.spec, job.rules, job.batch, sharding.make_mesh(*job.mesh))
    program.run(3)
    step_milliseconds = statistics.median(program.run(10)) * 1e3
    device = jax.devices()[0].device_kind
    profile = Profile(device, step_milliseconds, steps, kernels(program, steps))
    show(profile, method, top)
    if out:
        write_result(out, json_text(to_plain(profile), indent=1) + "\n")
    return profile


def kernels(program: Program, steps: int) -> list[Kernel]:
    """Runs steps under the profiler and returns their kernels summed up, the most expensive first.

    On a mesh of several devices, counts and times are the mean over the devices.
    """
    with tempfile.TemporaryDirectory(prefix="mora-profile-") as folder:
        with jax.profiler.trace(folder):
            program.run(steps)
        data = ProfileData.from_file(str(next(Path(folder).rglob("*.xplane.pb"))))
    ops = operations(program.compiled.as_text())
    seconds: dict[tuple[str, Op], float] = collections.defaultdict(float)
    counts: dict[tuple[str, Op], int] = collections.defaultdict(int)
    for name, hlo_op, duration in _events(data):
        op = ops.get(hlo_op) or Op(kind_by_name(name))
        if op.kind != "control":
            seconds[_family(name), op] += duration
            counts[_family(name), op] += 1
    runs = steps * program.mesh.size
    return [
        Kernel(name, op, counts[name, op] / runs, total * 1e3 / runs)
        for (name, op), total in sorted(seconds.items(), key=lambda item: -item[1])
    ]


def _events(data: Any) -> Iterator[tuple[str, str, float]]:
    """Yields (name, operation, seconds) of everything that devices ran, or on a CPU its threads."""
    planes = {plane.name: plane for plane in data.planes}
    devices = [plane for name, plane in planes.items() if name.startswith("/device:")]
    for plane in devices or [planes["/host:CPU"]]:
        for line in plane.lines:
            if devices and not str(line.name).startswith(("Stream", "XLA Ops")):
                continue  # other lines repeat the same events, or sum them up
            for event in line.events:
                stats = _stats(event)
                if devices or "hlo_op" in stats:
                    yield event.name, str(stats.get("hlo_op", event.name)), event.duration_ns / 1e9


def _stats(event: Any) -> dict[str, Any]:
    """Returns an event's statistics. JAX warns while it makes them; raised as an error, that would abort."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return dict(event.stats)


def _family(name: str) -> str:
    """Returns a kernel's name without the number at its end."""
    return re.sub(r"([._]\d+)+$", "", name)


def show(profile: Profile, method: str, top: int) -> None:
    """Prints the most expensive kernels, and the sums by kind of work, part of the model and direction."""
    title = (
        f"{method}: a step of {profile.step_milliseconds:.2f} ms on {profile.device}, "
        f"kernels {profile.busy_milliseconds:.2f} ms"
    )
    table = Table("kernel", "runs", "ms", "share", "kind", "part", "", "operation", title=title)
    for kernel in profile.kernels[:top]:
        op = kernel.op
        share = kernel.milliseconds / profile.busy_milliseconds
        figures = (f"{kernel.count:.0f}", f"{kernel.milliseconds:.2f}", f"{share:.1%}")
        table.add_row(kernel.name[:60], *figures, op.kind, op.part, op.direction, _place(op))
    screen = console(width=max(console().width, 160))
    screen.print(table)
    for what in ("kind", "part", "direction"):
        sums = (f"{name} {value:.2f}" for name, value in profile.by(what).items())
        screen.print(f"ms by {what}: {', '.join(sums)}", highlight=False)


def _place(op: Op) -> str:
    primitive = op.op_name.rpartition("/")[2]
    source = op.source
    for folder in FOLDERS:
        source = source.removeprefix(f"{folder}/")
    return f"{primitive} {source}".strip()


def to_plain(profile: Profile) -> dict[str, Any]:
    """Returns a profile as JSON holds it."""
    rows = [
        {
            "name": kernel.name,
            "count": kernel.count,
            "milliseconds": kernel.milliseconds,
            **dataclasses.asdict(kernel.op),
            "part": kernel.op.part,
            "direction": kernel.op.direction,
        }
        for kernel in profile.kernels
    ]
    sums = {what: profile.by(what) for what in ("kind", "part", "direction")}
    return {
        "device": profile.device,
        "step_milliseconds": profile.step_milliseconds,
        "busy_milliseconds": profile.busy_milliseconds,
        "steps": profile.steps,
        **sums,
        "kernels": rows,
    }
