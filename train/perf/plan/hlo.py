"""The collectives of a compiled program, read from the text of its optimised HLO.

What a loop does counts as often as the loop runs. A collective that the compiler started in one place and
finished in another, or spread over several fusions to hide it behind products, counts once.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

from train.perf.hlo import Computation, Instruction, parse

# What each device sends of a whole array of one byte when n take part, by the ring algorithms.
SENT = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}
KINDS = tuple(SENT)

_SHAPE = re.compile(r"\b(pred|[a-z]+[0-9]+[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([^\s,)}]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind over the same axes of the mesh, in one run of the program.

    Attributes:
      kind: as HLO names it, such as "all-gather".
      axes: the axes of the mesh over which the devices of a group differ, joined by "+".
      times: how often one runs.
      bytes: of the whole arrays, gathered or not yet scattered, over all runs.
      sent: bytes that each device sends over all runs, by ring algorithms.
    """

    kind: str
    axes: str
    times: int
    bytes: int
    sent: int


def collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """What a program sends, by kind and axes.

    Args:
      text: optimised HLO of one device's program.
      mesh: axis names and sizes of the mesh whose devices, in order, are the program's partitions.

    Raises:
      ValueError: for HLO that is not understood: a count too low would be worse.
    """
    program = parse(text)
    found: dict[tuple[str, str], Collective] = {}
    for kind, instruction, times in _walk(program.computations, program.entry, 1):
        groups = _groups(instruction.text, math.prod(mesh.values()))
        axes, size = _axes(groups, mesh), max(len(g) for g in groups)
        if not axes:
            continue  # every device by itself
        whole = _bytes(instruction, size) * times
        sent = round(whole * SENT[kind](size))
        old = found.get((kind, axes), Collective(kind, axes, 0, 0, 0))
        found[kind, axes] = Collective(kind, axes, old.times + times, old.bytes + whole, old.sent + sent)
    return sorted(found.values(), key=lambda c: -c.sent)


def _walk(
    computations: Mapping[str, Computation], name: str, times: int
) -> Iterator[tuple[str, Instruction, int]]:
    """(kind, instruction, runs) of every collective that a computation runs `times` times over."""
    in_fusions: set[str] = set()
    for instruction in computations[name].values():
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS:
            yield kind, instruction, times
        elif instruction.opcode == "while":
            runs = times * _trip_count(computations, instruction.text)
            yield from _walk(computations, _CALLED.findall(instruction.text)[0], runs)
        elif instruction.opcode == "fusion":
            called = _CALLED.findall(instruction.text)[0]
            for kind, inner, runs in _walk(computations, called, times):
                channel = re.search(r"channel_id=(\d+)", inner.text)
                if channel and channel[1] in in_fusions:
                    continue  # the same one, spread over several fusions
                in_fusions |= {channel[1]} if channel else set()
                # TPUs write a reduce-scatter as a fusion of an all-reduce and a slice.
                scatters = kind == "all-reduce" and "reduce-scatter" in called
                yield ("reduce-scatter" if scatters else kind), inner, runs
        elif instruction.opcode in ("call", "conditional", "async-start"):
            branches = ", ".join(_BRANCHES.findall(instruction.text)).replace("%", "").split(", ")
            for called in (*_CALLED.findall(instruction.text), *filter(None, branches)):
                yield from _walk(computations, called, times)


def _trip_count(computations: Mapping[str, Computation], text: str) -> int:
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', text):
        return int(known[1])
    condition = re.search(r"\bcondition=%?([^\s,)}]+)", text)
    inside = computations[condition[1]] if condition else {}
    for instruction in inside.values():
        if instruction.opcode == "compare" and "direction=LT" in instruction.text:
            for operand in re.findall(r"%?([\w.\-]+)[,)]", instruction.text):
                constant = inside.get(operand)
                if constant and constant.opcode == "constant":
                    return int(re.search(r"constant\((\d+)\)", constant.text)[1])  # pyright: ignore
    raise ValueError(f"a loop whose length is not known: {text[:200]}")


def _bytes(instruction: Instruction, size: int) -> int:
    """Of the whole array."""
    shapes = [_shape_bytes(*shape) for shape in _SHAPE.findall(instruction.type)]
    if instruction.opcode == "collective-permute-start":
        return shapes[1]  # (input, output, two semaphores)
    if instruction.opcode == "all-gather-start":
        return sum(shapes[len(shapes) // 2 :])  # (inputs, outputs)
    return sum(shapes) * (size if instruction.opcode == "reduce-scatter" else 1)


def _shape_bytes(kind: str, dimensions: str) -> int:
    bits = 8 if kind == "pred" else int(re.findall(r"\d+", kind)[0])
    return math.prod(int(d) for d in dimensions.split(",") if d) * bits // 8


def _groups(text: str, devices: int) -> list[list[int]]:
    """The groups of partitions that talk to each other, in any of HLO's three notations."""
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", text):
        return [[int(i) for i in pair.split(",")] for pair in re.findall(r"\{([\d,]+)\}", pairs[1])]
    if lists := re.search(r"replica_groups=\{(\{.*?\})\}", text):
        return [[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", lists[1])]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _iota(iota[2], iota[3]).reshape(_integers(iota[1])).tolist()
    if named := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}", text):
        return _mesh_groups(*named.groups())
    if "replica_groups={}" in text or "replica_groups" not in text:
        return [list(range(devices))]
    raise ValueError(f"replica groups in a notation that is not known: {text[:300]}")


def _mesh_groups(mesh: str, order: str | None, axes: str) -> list[list[int]]:
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
    """The axes along which members of a group differ."""
    places = [np.array(np.unravel_index(group, tuple(mesh.values()))) for group in groups]
    differs = [any(len(set(place[i])) > 1 for place in places) for i in range(len(mesh))]
    return "+".join(itertools.compress(mesh, differs))
