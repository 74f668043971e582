"""Makes the plan that `mora plan` asks for, and prints it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from mora_jax.errors import InputError
from mora_jax.io import json_text
from train.config.run import RunConfig
from train.console.terminal import console
from train.perf.plan.plan import Plan, make_plan
from train.perf.plan.programs import TRAINING, Program
from train.perf.plan.targets import of_gpus, simulated, topology, use_no_accelerator
from train.storage.files import write_result

MIB, GIB = 2**20, 2**30


def plan(
    config: RunConfig, topology_name: str, devices: int, memory: float, programs: Sequence[str] = TRAINING
) -> Plan:
    """Returns the plan for a topology of TPUs or GPUs, or for simulated devices of `memory` GiB.

    Raises:
      InputError: unless exactly one of the two is given, and as `make_plan`.
    """
    if bool(topology_name) == bool(devices):
        raise InputError("mora plan needs either --topology, such as v5e:16x16, or --devices, such as 8")
    use_no_accelerator()
    config = _with_attention_for(config, topology_name)
    target = topology(topology_name) if topology_name else simulated(devices, memory)
    with console(stderr=True).status(Text(f"compiling for {target.name}")):
        return make_plan(config, target, programs)


def _with_attention_for(config: RunConfig, topology_name: str) -> RunConfig:
    """Returns the config with an attention that the compiler knows.

    The CPU compiler knows only xla, which needs more memory than cudnn.
    """
    kernel, on_gpus = config.compute.attention, not topology_name or of_gpus(topology_name)
    if not on_gpus and kernel == "cudnn":
        raise InputError("--compute.attention cudnn needs NVIDIA GPUs; use splash or xla on TPUs")
    if on_gpus and kernel == "splash":
        raise InputError("--compute.attention splash needs TPUs; use cudnn or xla on GPUs")
    if topology_name or kernel != "cudnn":
        return config
    return dataclasses.replace(config, compute=dataclasses.replace(config.compute, attention="xla"))


def show(plan: Plan, title: str, out: str = "") -> None:
    """Prints a plan. Writes its figures to the JSON file `out`, unless that is empty."""
    if out:
        write_result(out, json_text(plan.to_plain(), indent=2) + "\n")
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    parts: list[Any] = [
        f"{title} on {plan.target}: {mesh}.",
        "",
        "The state on each device, from its shardings:",
    ]
    parts.append(_state(plan))
    for program in plan.programs:
        parts += ["", f"{program.name} on each device, by the {plan.compiler}:", _program(program, plan)]
    parts += ["", "Sent by each device in a training step:", _sent(plan), "", *_conclusions(plan)]
    console(highlight=False).print(*parts, sep="\n")


def _state(plan: Plan) -> Table:
    table = Table("", "", show_header=False)
    held = plan.held
    for name, size in {
        "parameters": held.parameters,
        "adapters": held.adapters,
        "optimizer of parameters": held.base_optimizer,
        "optimizer of adapters": held.adapter_optimizer,
        "total": held.total(),
    }.items():
        table.add_row(name, _size(size))
    table.add_row("a microbatch", f"{plan.sequences:g} sequences, {plan.microbatches} a step")
    return table


def _program(program: Program, plan: Plan) -> Table:
    table = Table("", "", show_header=False)
    if program.refused:
        table.add_row("does not fit", program.refused)
    else:
        table.add_row("inputs", _size(program.arguments))
        table.add_row("temporary", _size(program.temporary))
        table.add_row("peak", _size(program.peak) + (f" of {_size(plan.usable)}" if plan.usable else ""))
    table.add_row("products", f"{program.flops / 1e9:,.6g} GFLOP, 1/{plan.devices} of the step")
    table.add_row("compiled in", f"{program.seconds:,.1f} s")
    return table


def _sent(plan: Plan) -> Table:
    """Returns a table of what the training step sends, beside what the formula expects."""
    table = Table("collective", "over", "times", "sent", "expected", "of it adapters")
    compiled = {(c.kind, c.axes): c for c in plan.programs[0].collectives}
    formula = {(e.kind, e.axes): e for e in plan.expected}
    for key in dict.fromkeys((*compiled, *formula)):
        found, line = compiled.get(key), formula.get(key)
        sent = (f"{found.times:,}", _size(found.sent)) if found else ("", "")
        expected = (_size(line.base + line.adapters), _size(line.adapters)) if line else ("", "")
        table.add_row(*key, *sent, *expected)
    total = _size(sum(c.sent for c in compiled.values())) if compiled else ""
    base, adapters = _expected(plan)
    table.add_section()
    table.add_row("total", "", "", total, _size(base + adapters), _size(adapters))
    return table


def _expected(plan: Plan) -> tuple[int, int]:
    """Returns the bytes expected to be sent, for the base model and for adapters."""
    return sum(line.base for line in plan.expected), sum(line.adapters for line in plan.expected)


def _conclusions(plan: Plan) -> list[str]:
    state, held = plan.held.total(), plan.held
    of_state = (held.adapters + held.adapter_optimizer) / state
    base, adapters = _expected(plan)
    of_sent = adapters / (base + adapters) if base + adapters else 0.0
    lines = [f"Adapters are {of_state:.1%} of the state and {of_sent:.1%} of the bytes expected to be sent."]
    if plan.simulated():
        lines.append(
            "The state is exact. Peak, temporary and collectives are the CPU compiler's, with attention by "
            "xla. They differ on a GPU."
        )
    unknown = (
        "The state fits. The program does not fit by the CPU compiler's figures; on a GPU it may."
        if plan.usable
        else "It is unknown whether it fits: give the memory of a device with --memory."
    )
    return [*lines, {True: "It fits.", False: "It does not fit.", None: unknown}[plan.fits()]]


def _size(size: float) -> str:
    if size >= GIB:
        return f"{size / GIB:,.2f} GiB"
    return f"{size / MIB:,.2f} MiB" if size >= MIB / 100 else f"{size:,.0f} B"
