"""Layouts: in which ways an array may be divided over a mesh, and the choice of one."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from jax.sharding import PartitionSpec as P

from mora_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # what divides a batch
STATE = ("fsdp", "tensor")  # what divides the state

Sizes: TypeAlias = Mapping[str, int]
# A part of an array: for each axis the first index and the last one, exclusive.
Box: TypeAlias = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The ways in which an array may be divided over a mesh.

    Specs are about the last axes of an array. Leading axes, stacked layers, are never divided.

    Attributes:
      choices: specs, preferred first. The first one whose mesh axes all divide the array is used: JAX refuses
        uneven shards, and a width such as 5461 has few divisors.
      used: how the array is divided while products use it. The default replicates it.
      hint: what a user can change when no choice divides the array.
    """

    choices: tuple[P, ...]
    used: P = P()  # noqa: RUF009 (immutable)
    hint: str = "use sizes that divide one"


# (regex of the end of a path, layout): the first match counts. Optimizer state lies at the path of its
# parameter, behind a prefix.
Rules: TypeAlias = Sequence[tuple[str, Layout]]

REPLICATED = Layout((P(),))
# Kernels whose outputs are divided over `tensor`, and kernels whose inputs are.
COLUMNS = Layout((P("fsdp", "tensor"), P(STATE, None)), used=P(None, "tensor"))
ROWS = Layout((P("tensor", "fsdp"), P(None, STATE)), used=P("tensor", None))


def find(name: str, rules: Rules) -> Layout:
    """Returns the layout of the first rule whose regex matches the end of a path.

    Raises:
      InputError: if no rule covers the path.
    """
    return _find(name, tuple(rules))


@functools.cache
def _find(name: str, rules: Rules) -> Layout:
    for regex, layout in rules:
        if re.fullmatch(f"(.*/)?({regex})", name):
            return layout
    raise InputError(f"no sharding rule covers {name!r}")


def spec_at(name: str, shape: Sequence[int], sizes: Sizes, rules: Rules) -> P:
    """Returns how a mesh of the given sizes divides the array at a path; scalars are replicated.

    Raises:
      InputError: if no rule covers the path, or no choice of its layout divides the shape.
    """
    return spec(find(name, rules), shape, sizes, name) if shape else P()


def spec(layout: Layout, shape: Sequence[int], sizes: Sizes, name: str = "an array") -> P:
    """Returns how a mesh of the given sizes divides an array of a layout.

    Raises:
      InputError: if no choice of the layout divides the shape; the message names the array.
    """
    for choice in layout.choices:
        if divides(choice, shape, sizes):
            return canonical(choice, len(shape), sizes)
    by = ", ".join(f"mesh.{axis} {sizes[axis]}" for axis in AXES if sizes[axis] > 1)
    raise InputError(f"{by}: no axis of {name} {tuple(shape)} can be divided so; {layout.hint}")


def used(layout: Layout, shape: Sequence[int], sizes: Sizes) -> P:
    """Returns how an array is divided while products use it; replicated if that does not divide it."""
    return canonical(layout.used, len(shape), sizes) if divides(layout.used, shape, sizes) else P()


def divides(choice: P, shape: Sequence[int], sizes: Sizes) -> bool:
    """Returns whether every mesh axis of a spec divides its axis of the shape."""
    if len(choice) > len(shape):
        return False
    widths = shape[len(shape) - len(choice) :]
    return all(
        width % math.prod(sizes[name] for name in names(axis)) == 0
        for width, axis in zip(widths, choice, strict=True)
    )


def canonical(choice: P, ndim: int, sizes: Sizes) -> P:
    """Returns a spec for all axes, without mesh axes of size 1: equal layouts have equal specs."""
    entries: list[Any] = [None] * (ndim - len(choice))
    for axis in choice:
        wide = tuple(name for name in names(axis) if sizes[name] > 1)
        entries.append(wide if len(wide) > 1 else wide[0] if wide else None)
    while entries and entries[-1] is None:
        entries.pop()
    return P(*entries)


def names(axis: Any) -> tuple[str, ...]:
    """Returns the mesh axes of one entry of a spec."""
    return axis if isinstance(axis, tuple) else (axis,) if axis else ()
