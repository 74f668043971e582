"""Options of the compiler, and the text of compiled programs (HLO)."""

import dataclasses
import re
from collections.abc import Mapping
from typing import TypeAlias

from mora_jax.errors import InputError

_HEADER = re.compile(r"^(?:ENTRY )?%?([^\s(]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(\S+) = (.*)$")
# The type may be a tuple that contains spaces and comments; the operation is the first word after it.
_OPCODE = re.compile(r" ([a-z][\w\-]*)\(")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      opcode: the operation, such as "fusion".
      type: type of the result, as text.
      text: everything after the type: operands, attributes and metadata.
    """

    opcode: str
    type: str
    text: str

    def called(self, attribute: str) -> str:
        """Returns the computation that an attribute such as "calls" or "body" names, or "" without it."""
        match = re.search(rf"\b{attribute}=%?([^\s,)}}]+)", self.text)
        return match[1] if match else ""


Computation: TypeAlias = Mapping[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Program:
    """One program.

    Attributes:
      computations: instructions by name, for each computation by name; callees come before their callers.
      entry: name of the computation where the program begins.
    """

    computations: Mapping[str, Computation]
    entry: str


def parse(text: str) -> Program:
    """Returns the program of a text. Raises ValueError if it has no entry computation."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, inside = "", {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            inside = computations.setdefault(header[1], {})
            entry = header[1] if line.startswith("ENTRY") else entry
        elif (instruction := _INSTRUCTION.match(line)) and (opcode := _OPCODE.search(instruction[2])):
            kind, rest = instruction[2][: opcode.start()], instruction[2][opcode.start() :]
            inside[instruction[1]] = Instruction(opcode[1], kind, rest)
    if not entry:
        raise ValueError("no ENTRY computation in the HLO")
    return Program(computations, entry)


def option(flag: str) -> tuple[str, str | bool]:
    """Returns name and value of one of XLA's options from NAME=VALUE; leading dashes are ignored.

    Raises:
      InputError: for text of another form.
    """
    name, equals, value = flag.strip().lstrip("-").partition("=")
    if not equals or not name.startswith("xla_"):
        raise InputError(f"{flag!r} is not a flag of XLA: give xla_NAME=VALUE")
    return name, {"true": True, "false": False}.get(value.lower(), value)
