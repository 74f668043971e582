"""What a compiled step sends between devices, and how long its devices wait for it."""

import dataclasses
import re
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
from jax.profiler import ProfileData

from train.perf.bench.program import Program
from train.perf.plan.hlo import SENT, Collective, collectives

Span: TypeAlias = tuple[float, float]  # start and end

# Names of kernels: NCCL's on GPUs, HLO's on TPUs.
_COMMUNICATES = re.compile(rf"nccl|^(?:{'|'.join(SENT)})", re.IGNORECASE)
_NCCL_KIND = re.compile(r"nccl\w*?_(AllReduce|AllGather|ReduceScatter|SendRecv|Broadcast)", re.IGNORECASE)
_HLO_KINDS = {
    "allreduce": "all-reduce",
    "allgather": "all-gather",
    "reducescatter": "reduce-scatter",
    "sendrecv": "send-receive",
}


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Where the time of a step goes, in milliseconds, the mean over the devices.

    Attributes:
      computing: some kernel that computes runs.
      exposed: kernels that communicate run, and no other.
      idle: no kernel runs.
      communicating: some kernel that communicates runs, hidden or not.
      by_kind: the sum of the times of these kernels, by kind.
    """

    computing: float
    exposed: float
    idle: float
    communicating: float
    by_kind: dict[str, float]


def sent(text: str, mesh: Mapping[str, int]) -> list[Collective] | None:
    """Returns what each device sends in a step, from the compiled HLO; None if it cannot be read."""
    try:
        return collectives(text, mesh)
    except (ValueError, KeyError, IndexError):  # notation of another compiler version
        return None


def by_kind(found: Iterable[Collective]) -> dict[str, int]:
    """Returns the bytes that each device sends by kind of collective, the largest first."""
    sums: Counter[str] = Counter()
    for collective in found:
        sums[collective.kind] += collective.sent
    return dict(sums.most_common())


def profiled(program: Program, steps: int) -> Timeline | None:
    """Runs steps under the profiler. Returns None where devices have no streams, as on a CPU."""
    if jax.devices()[0].platform == "cpu" or not steps:
        return None
    with tempfile.TemporaryDirectory(prefix="mora-profile-") as folder:
        with jax.profiler.trace(folder):
            program.run(steps)
        # Each process writes the trace of its own devices.
        data = [ProfileData.from_file(str(path)) for path in Path(folder).rglob("*.xplane.pb")]
    planes = [plane for part in data for plane in part.planes]
    return timeline([_kernels(plane) for plane in planes if plane.name.startswith("/device:")], steps)


def timeline(devices: Sequence[Sequence[tuple[str, Span]]], steps: int) -> Timeline | None:
    """Returns where the time goes, from the names and times (ns) of each device's kernels.

    Returns None if no device ran a kernel.
    """
    found = [_of_device(kernels, steps) for kernels in devices if kernels]
    if not found:
        return None
    kinds = {kind for each in found for kind in each.by_kind}
    mean = {
        field.name: sum(getattr(each, field.name) for each in found) / len(found)
        for field in dataclasses.fields(Timeline)
        if field.name != "by_kind"
    }
    sums = {kind: sum(each.by_kind.get(kind, 0.0) for each in found) / len(found) for kind in sorted(kinds)}
    return Timeline(**mean, by_kind=sums)


def _of_device(kernels: Sequence[tuple[str, Span]], steps: int) -> Timeline:
    milliseconds = 1e-6 / steps
    sends = [(name, span) for name, span in kernels if _COMMUNICATES.search(name)]
    computes = [span for name, span in kernels if not _COMMUNICATES.search(name)]
    busy, computing = (_length(spans) for spans in ([span for _, span in kernels], computes))
    whole = max(end for _, (_, end) in kernels) - min(start for _, (start, _) in kernels)
    sums: defaultdict[str, float] = defaultdict(float)
    for name, (start, end) in sends:
        sums[_kind(name)] += end - start
    return Timeline(
        computing=computing * milliseconds,
        exposed=(busy - computing) * milliseconds,
        idle=(whole - busy) * milliseconds,
        communicating=_length([span for _, span in sends]) * milliseconds,
        by_kind={kind: total * milliseconds for kind, total in sums.items()},
    )


def _kind(name: str) -> str:
    if match := _NCCL_KIND.search(name):
        return _HLO_KINDS.get(match[1].lower(), match[1].lower())
    return next((kind for kind in SENT if name.startswith(kind)), "other")


def _length(spans: Iterable[Span]) -> float:
    """Returns the time that at least one of the spans covers."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def _kernels(plane: Any) -> list[tuple[str, Span]]:
    """Returns names and times of what a device ran on its streams."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return [
            (event.name, (event.start_ns, event.start_ns + event.duration_ns))
            for line in plane.lines
            if str(line.name).startswith(("Stream", "XLA Ops"))  # others repeat the same events
            for event in line.events
        ]
