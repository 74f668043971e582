"""Finds the collectives of a compiled program in the text of its optimised HLO.

A collective in a loop counts once for each run of the loop. It counts once where the compiler starts it in
one place and finishes it in another, or spreads it over several fusions to hide it behind products.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

from train.perf.hlo import Computation, Instruction, parse

# The bytes that each of n devices sends for an array of one byte, by the ring algorithms.
SENT = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}

_SHAPE = re.compile(r"\b(pred|[a-z]+[0-9]+[a-z0-9]*)\[([\d,]*)\]")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind over the same axes of the mesh, in one run of the program.

    Attributes:
      kind: HLO's name, such as "all-gather".
      axes: axes of the mesh along which the devices of a group differ, joined by "+".
      times: runs.
      bytes: size of the complete arrays (gathered, or not yet scattered), summed over all runs.
      sent: bytes that each device sends in all runs, by ring algorithms.
    """

    kind: str
    axes: str
    times: int
    bytes: int
    sent: int


def collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """Returns what a program sends, by kind and axes, the largest first.

    Args:
      text: optimised HLO of one device's program.
      mesh: axis names and sizes of the mesh. Its devices, in order, are the program's partitions.

    Raises:
      ValueError: for HLO that this parser does not know. A silent omission would count too little.
    """
    program = parse(text)
    found: dict[tuple[str, str], Collective] = {}
    for kind, instruction, times in _walk(program.computations, program.entry, 1):
        groups = _groups(instruction.text, math.prod(mesh.values()))
        axes, size = _axes(groups, mesh), max(len(g) for g in groups)
        if not axes:
            continue  # each device is a group of its own
        complete = _bytes(instruction, size) * times
        sent = round(complete * SENT[kind](size))
        old = found.get((kind, axes), Collective(kind, axes, 0, 0, 0))
        found[kind, axes] = Collective(kind, axes, old.times + times, old.bytes + complete, old.sent + sent)
    return sorted(found.values(), key=lambda c: -c.sent)


def _walk(
    computations: Mapping[str, Computation], name: str, times: int
) -> Iterator[tuple[str, Instruction, int]]:
    """Yields (kind, instruction, runs) of every collective in a computation that runs `times` times."""
    in_fusions: set[str] = set()
    for instruction in computations[name].values():
        kind = instruction.opcode.removesuffix("-start")
        if kind in SENT:
            yield kind, instruction, times
        elif instruction.opcode == "while":
            # A loop that sends nothing may have any length.
            for kind, inner, runs in _walk(computations, instruction.called("body"), times):
                yield kind, inner, runs * _trip_count(computations, instruction)
        elif instruction.opcode in ("fusion", "fusion-start"):
            fusion = instruction.called("calls")
            for kind, inner, runs in _walk(computations, fusion, times):
                # TPUs write a reduce-scatter as a fusion of an all-reduce and a slice.
                scatters = kind == "all-reduce" and "reduce-scatter" in fusion
                channel = re.search(r"channel_id=(\d+)", inner.text)
                # Of scatters, those of several layers may have one channel.
                if channel and channel[1] in in_fusions and not scatters:
                    continue  # one collective, spread over several fusions
                in_fusions |= {channel[1]} if channel else set()
                yield ("reduce-scatter" if scatters else kind), inner, runs
        elif instruction.opcode in ("call", "conditional", "async-start"):
            for callee in _callees(instruction):
                yield from _walk(computations, callee, times)


def _callees(instruction: Instruction) -> Iterator[str]:
    """Yields the computations that a call runs, or a conditional may run."""
    for attribute in ("calls", "to_apply", "true_computation", "false_computation"):
        if callee := instruction.called(attribute):
            yield callee
    for branches in _BRANCHES.findall(instruction.text):
        yield from branches.replace("%", "").split(", ")


def _trip_count(computations: Mapping[str, Computation], loop: Instruction) -> int:
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.text):
        return int(known[1])
    inside = computations.get(loop.called("condition"), {})
    for instruction in inside.values():
        if instruction.opcode == "compare" and "direction=LT" in instruction.text:
            for operand in re.findall(r"%?([\w.\-]+)[,)]", instruction.text):
                constant = inside.get(operand)
                if constant and constant.opcode == "constant":
                    return int(re.search(r"constant\((\d+)\)", constant.text)[1])  # pyright: ignore
    raise ValueError(f"a loop of unknown length: {loop.text[:200]}")


def _bytes(instruction: Instruction, size: int) -> int:
    """Returns the size of the complete array of a collective among groups of `size` devices."""
    shapes = [_shape_bytes(*shape) for shape in _SHAPE.findall(instruction.type)]
    kind, half = instruction.opcode.removesuffix("-start"), len(shapes) // 2
    if instruction.opcode == "collective-permute-start":
        return shapes[1]  # (input, output, two semaphores)
    if instruction.opcode == "all-gather-start" or instruction.type.startswith("(("):
        # GPUs start every collective with the type (inputs, outputs), other devices all-gathers alone.
        return sum(shapes[half:] if kind == "all-gather" else shapes[:half])
    return sum(shapes) * (size if kind == "reduce-scatter" else 1)


def _shape_bytes(kind: str, dimensions: str) -> int:
    bits = 8 if kind == "pred" else int(re.findall(r"\d+", kind)[0])
    return math.prod(int(d) for d in dimensions.split(",") if d) * bits // 8


def _groups(text: str, devices: int) -> list[list[int]]:
    """Returns the groups of partitions that communicate, from any of HLO's notations."""
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", text):
        return [_integers(pair) for pair in re.findall(r"\{([\d,]+)\}", pairs[1])]
    if lists := re.search(r"replica_groups=\{(\{.*?\})\}", text):
        return [_integers(group) for group in re.findall(r"\{([\d,]+)\}", lists[1])]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _iota(iota[2], iota[3]).reshape(_integers(iota[1])).tolist()
    if named := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}", text):
        return _mesh_groups(*named.groups())
    if "replica_groups={}" in text or "replica_groups" not in text:
        return [list(range(devices))]
    raise ValueError(f"replica groups in an unknown notation: {text[:300]}")


def _mesh_groups(mesh: str, order: str | None, axes: str) -> list[list[int]]:
    """Returns the groups of the notation mesh['a'=4,'b'=2], device_ids=(ORDER) {'a':(BEFORE)SIZE}."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    ids = np.arange(math.prod(sizes.values()))
    if order and (iota := re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order)):
        ids = _iota(iota[1], iota[2])
    elif order:
        ids = np.array(_integers(order))
    dimensions: list[int] = []
    within: list[int] = []
    parts = {
        name: (before, size) for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
    }
    for name, size in sizes.items():
        before, part = parts.get(name, ("1", "1"))
        split = (int(before), int(part), size // int(before) // int(part)) if before else (1, size, 1)
        dimensions += split
        within.append(len(dimensions) - 2)
    count = math.prod(dimensions[i] for i in within)
    return np.moveaxis(ids.reshape(dimensions), within, range(-len(within), 0)).reshape(-1, count).tolist()


def _iota(dimensions: str, order: str | None) -> np.ndarray:
    ids = np.arange(math.prod(_integers(dimensions))).reshape(_integers(dimensions))
    return ids.transpose(_integers(order)).reshape(-1) if order else ids.reshape(-1)


def _integers(text: str) -> list[int]:
    return [int(i) for i in text.split(",")]


def _axes(groups: list[list[int]], mesh: Mapping[str, int]) -> str:
    """Returns the axes along which the members of a group differ, joined by "+"."""
    places = [np.array(np.unravel_index(group, tuple(mesh.values()))) for group in groups]
    differs = [any(len(set(place[i])) > 1 for place in places) for i in range(len(mesh))]
    return "+".join(itertools.compress(mesh, differs))
