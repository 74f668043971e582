"""`mora plan`: what a config needs of each device, from its shardings and from the compiler itself."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from mora_jax import sharding
from train.config.run import RunConfig
from train.jobs.evaluate import check_mesh
from train.perf.plan.formula import Expected, expected
from train.perf.plan.programs import PROGRAMS, Program
from train.perf.plan.targets import CPU_COMPILER, Target
from train.run.state import abstract_state, assign_methods


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
        """Whether every program fits.

        None where that is not known: the devices' memory is not, or they are simulated, the state fits, and
        only by the CPU compiler's figures a program does not.
        """
        if any(program.refused for program in self.programs):
            return False
        if not self.usable or self.held.total() > self.usable:
            return False if self.usable else None
        fits = all(program.peak <= self.usable for program in self.programs)
        return fits or (None if self.simulated() else False)

    def simulated(self) -> bool:
        """Whether CPU devices stand in the place of others."""
        return self.compiler == CPU_COMPILER

    def to_plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return dataclasses.asdict(self) | {"fits": self.fits()}


def make_plan(config: RunConfig, target: Target, programs: Sequence[str] = ("train",)) -> Plan:
    """Compiles a config's programs for a target: "train", "restart" and "eval"; with none, only the state's
    sizes and the formula are there.

    Raises:
      InputError: if mesh, batches and devices do not fit each other.
    """
    mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh), devices=target.devices)
    check_mesh(config, mesh)
    methods = assign_methods(config)
    state = abstract_state(config, methods, mesh)
    return Plan(
        target=target.name,
        compiler=target.compiler,
        devices=mesh.size,
        mesh=dict(mesh.shape),
        sequences=config.batch_size / config.microbatches / sharding.batch_shards(mesh),
        microbatches=config.microbatches,
        usable=target.memory,
        held=held(state),
        programs=[PROGRAMS[name](config, methods, state, mesh) for name in programs],
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
