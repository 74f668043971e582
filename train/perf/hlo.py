"""The text of compiled programs (HLO), taken apart."""

import dataclasses
import re
from collections.abc import Mapping
from typing import TypeAlias

_HEADER = re.compile(r"^(?:ENTRY )?%?([^\s(]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(\S+) = (.*)$")
# The result's type may be a tuple with spaces and comments in it; the operation is the first word behind it.
_OPCODE = re.compile(r" ([a-z][\w\-]*)\(")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      opcode: what is done, such as "fusion".
      type: of what it gives, as text.
      text: all after the type: operands, attributes and metadata.
    """

    opcode: str
    type: str
    text: str


Computation: TypeAlias = Mapping[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Program:
    """One program.

    Attributes:
      computations: by name, each its instructions by name; what is called stands before what calls it.
      entry: the name of the computation that the program begins with.
    """

    computations: Mapping[str, Computation]
    entry: str


def parse(text: str) -> Program:
    """A program from its text. Raises ValueError where it begins nowhere."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, inside = "", {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            inside = computations.setdefault(header[1], {})
            entry = header[1] if line.startswith("ENTRY") else entry
        elif (instruction := _INSTRUCTION.match(line)) and (opcode := _OPCODE.search(instruction[2])):
            given, rest = instruction[2][: opcode.start()], instruction[2][opcode.start() :]
            inside[instruction[1]] = Instruction(opcode[1], given, rest)
    if not entry:
        raise ValueError("no ENTRY computation in the HLO")
    return Program(computations, entry)
