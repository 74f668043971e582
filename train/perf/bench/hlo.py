"""Classifies the operations of a compiled program and finds the source lines they come from."""

import dataclasses
import re
from typing import Literal

from train.perf.hlo import Instruction, parse

Kind = Literal["matmul", "attention", "scatter", "reduction", "copy", "elementwise", "control"]

TARGET = re.compile(r'custom_call_target="([^"]*)"')
OP_NAME = re.compile(r'op_name="([^"]*)"')
SOURCE = re.compile(r'source_file="([^"]*)" source_line=(\d+)')
TRITON = re.compile(r"__triton\w*gemm")
FRAME = re.compile(r"stack_frame_id=(\d+)")

MATMUL = ("gemm", "matmul", "dot", "convolution", "cublas")
ATTENTION = ("fmha", "flash", "sdpa", "attention")
CONTROL = (
    "while",
    "conditional",
    "call",
    "tuple",
    "get-tuple-element",
    "parameter",
    "async-start",
    "async-done",
)
MOVES = {
    "parameter", "constant", "copy", "transpose", "bitcast", "reshape", "slice", "dynamic-slice",
    "dynamic-update-slice", "concatenate", "broadcast", "pad", "convert", "tuple", "get-tuple-element",
    "iota",
}  # fmt: skip

# Words in the names of a model's modules; the first part that matches counts.
PARTS = {
    "norm": ("layernorm", "/norm/"),
    "attention": ("self_attn",),
    "mlp": ("/mlp",),
    "embedding": ("embed_tokens",),
    "layers": ("Llama.hidden",),
}


@dataclasses.dataclass(frozen=True)
class Op:
    """One operation.

    Attributes:
      kind: kind of work.
      op_name: JAX's name: the enclosing functions and modules, then the primitive.
      source: file:line of the caller; empty if the program does not record it.
    """

    kind: Kind
    op_name: str = ""
    source: str = ""

    @property
    def direction(self) -> str:
        """forward, backward, or update for operations outside the model."""
        outermost = self.op_name.partition("/")[2].partition("/")[0]
        if "transpose(jvp" in self.op_name or "transpose(" in outermost:
            return "backward"
        return "forward" if "jvp(" in self.op_name else "update"

    @property
    def part(self) -> str:
        """The part of the model or of the step."""
        for part, words in PARTS.items():
            if any(word in self.op_name for word in words):
                return part
        if "jvp(" in self.op_name:
            return "loss"
        return "optimizer" if self.op_name else "unnamed"


def kind_by_name(kernel: str) -> Kind:
    """Returns the likely kind of a kernel whose operation is unknown."""
    kernel = kernel.lower()
    if any(word in kernel for word in ATTENTION):
        return "attention"
    if any(word in kernel for word in (*MATMUL, "nvjet", "cutlass")):
        return "matmul"
    return "copy" if "memcpy" in kernel or "copy" in kernel else "elementwise"


def operations(text: str) -> dict[str, Op]:
    """Returns every instruction of a compiled program's text by its name."""
    frames = _frames(text)
    computations = parse(text).computations
    bodies: dict[str, set[str]] = {}
    for name, computation in computations.items():  # callees come before their callers
        bodies[name] = set().union(*(_inside(each, bodies) for each in computation.values()))
    return {
        name: _operation(instruction, bodies, frames)
        for computation in computations.values()
        for name, instruction in computation.items()
    }


def _operation(instruction: Instruction, bodies: dict[str, set[str]], frames: dict[int, str]) -> Op:
    text = instruction.text
    name, file, frame = OP_NAME.search(text), SOURCE.search(text), FRAME.search(text)
    source = f"{file[1]}:{file[2]}" if file else frames.get(int(frame[1]), "") if frame else ""
    op_name = name[1] if name else ""
    return Op(_kind(instruction, op_name, bodies), op_name, source)


def _kind(instruction: Instruction, op_name: str, bodies: dict[str, set[str]]) -> Kind:
    if instruction.opcode in CONTROL:
        return "control"
    inside, target = _inside(instruction, bodies), TARGET.search(instruction.text)
    label = target[1].lower() if target else ""
    if any(word in label for word in ATTENTION):
        return "attention"
    if any(word in label for word in MATMUL) or inside & {"dot", "convolution"}:
        return "matmul"
    if TRITON.search(instruction.text):
        return "matmul"
    if "scatter" in inside or "scatter" in label:
        return "scatter"
    if inside & {"reduce", "reduce-window", "sort"}:
        return "reduction"
    if inside <= MOVES:
        return "copy"
    return "matmul" if op_name.endswith("dot_general") else "elementwise"


def _inside(instruction: Instruction, bodies: dict[str, set[str]]) -> set[str]:
    """Returns the opcodes of the computation that an instruction calls, or its own opcode."""
    called = instruction.called("calls")
    return bodies.get(called, set()) if called else {instruction.opcode}


def _frames(text: str) -> dict[int, str]:
    """Returns file:line by stack frame, from the tables at the head of the text if there are any.

    A frame inside a library is replaced by the line that called the library.
    """
    files, locations, frames = (_table(text, name) for name in ("FileNames", "FileLocations", "StackFrames"))

    def place(frame: int) -> str:
        location = locations.get(_field(frames[frame], "file_location_id"), "")
        file = files.get(_field(location, "file_name_id"), "").strip('"')
        parent = _field(frames[frame], "parent_frame_id")
        if "site-packages" in file and parent in frames and parent != frame:
            return place(parent)
        return f"{file}:{_field(location, 'line')}" if file else ""

    return {frame: place(frame) for frame in frames}


def _table(text: str, name: str) -> dict[int, str]:
    """Returns the rows of one of the tables at the head of the text by their numbers."""
    _, found, rest = text.partition(f"\n{name}\n")
    rows = (line.partition(" ") for line in rest.partition("\n\n")[0].splitlines()) if found else ()
    return {int(number): row for number, _, row in rows if number.isdigit()}


def _field(row: str, name: str) -> int:
    match = re.search(rf"\b{name}=(\d+)", row)
    return int(match[1]) if match else 0
