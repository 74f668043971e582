"""`mora plan`: what a config needs of each device, from its shardings and from the compiler itself."""

import dataclasses
import math
from typing import Any

import jax

from mora_jax import sharding
from train import runs
from train.config import RunConfig
from train.evaluate import check_divides
from train.plan.formula import Expected, expected
from train.plan.programs import Program, eval_program, restart_program, train_program
from train.plan.targets import Target


@dataclasses.dataclass(frozen=True)
class Held:
    """Bytes of the state that one device holds.

    Attributes:
      parameters: of the model.
      adapters: of the adapters' arrays.
      base_optimizer: optimizer state of the model's own parameters.
      adapter_optimizer: optimizer state of the adapters.
    """

    parameters: int
    adapters: int
    base_optimizer: int
    adapter_optimizer: int

    def total(self) -> int:
        """All of it."""
        return self.parameters + self.adapters + self.base_optimizer + self.adapter_optimizer


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a config needs of each device of a target.

    Attributes:
      target: what it is planned for.
      compiler: whose figures `programs` are.
      devices: of the mesh.
      mesh: sizes of its axes.
      sequences: of a microbatch, on one device.
      microbatches: parts of a step.
      usable: bytes of a device that a program may use; 0 where that is not known.
      held: the state.
      programs: the training step first.
      expected: what a step should send.
    """

    target: str
    compiler: str
    devices: int
    mesh: dict[str, int]
    sequences: float
    microbatches: int
    usable: int
    held: Held
    programs: list[Program]
    expected: list[Expected]

    def fits(self) -> bool | None:
        """Whether every program fits; None where nothing is known of the devices' memory."""
        if any(program.refused for program in self.programs):
            return False
        return all(p.peak <= self.usable for p in self.programs) if self.usable else None

    def to_plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return dataclasses.asdict(self) | {"fits": self.fits()}


def make_plan(config: RunConfig, target: Target, every_program: bool = False) -> Plan:
    """Compiles a config's training step for a target, and with `every_program` its restart and evaluation.

    Raises:
      InputError: if mesh, batches and devices do not fit each other.
    """
    mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh), devices=target.devices)
    check_divides("batch_size / microbatches", config.batch_size // config.microbatches, mesh)
    methods = runs.assign_methods(config)
    state = runs.abstract_state(config, methods, mesh)
    make = [train_program]
    if every_program:
        check_divides("eval.batch_size", config.eval.batch_size, mesh)
        make += [restart_program, eval_program] if config.restart.every else [eval_program]
    return Plan(
        target=target.name,
        compiler=target.compiler,
        devices=mesh.size,
        mesh=dict(mesh.shape),
        sequences=config.batch_size / config.microbatches / mesh.size,
        microbatches=config.microbatches,
        usable=target.memory,
        held=held(state),
        programs=[program(config, methods, state, mesh) for program in make],
        expected=expected(config, methods, state, mesh),
    )


def held(state: Any) -> Held:
    """What one device holds of a state of shapes with shardings."""
    groups = state.opt_state.inner_states
    adapters = {group for group in groups if group.startswith("adapter")}
    return Held(
        _bytes(state.params),
        _bytes(state.adapters),
        _bytes([s for group, s in groups.items() if group not in adapters]),
        _bytes([s for group, s in groups.items() if group in adapters]),
    )


def _bytes(tree: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
