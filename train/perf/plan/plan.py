"""`mora plan`: what a config needs of each device, from its shardings and from the compiler."""

import dataclasses
import math
from collections.abc import Sequence, Set
from typing import Any

import jax

from mora_jax import sharding
from train.config.run import RunConfig
from train.jobs.evaluate import check_mesh
from train.perf.plan.formula import Expected, expected
from train.perf.plan.programs import PROGRAMS, TRAINING, Program, names_of
from train.perf.plan.targets import CPU_COMPILER, Target
from train.run.state import abstract_state, assign_methods
from train.step.optim import adapter_labels, array_options


@dataclasses.dataclass(frozen=True)
class Held:
    """Bytes of the state on one device.

    Attributes:
      parameters: the model's parameters.
      adapters: the arrays of adapters.
      base_optimizer: optimizer state of the model's parameters.
      adapter_optimizer: optimizer state of the adapters.
    """

    parameters: int
    adapters: int
    base_optimizer: int
    adapter_optimizer: int

    def total(self) -> int:
        """Returns the sum of all four."""
        return self.parameters + self.adapters + self.base_optimizer + self.adapter_optimizer


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a config needs of each device of a target.

    Attributes:
      target: name of the target.
      compiler: the compiler that compiled `programs`.
      devices: devices of the mesh.
      mesh: sizes of its axes.
      sequences: sequences of a microbatch on one device.
      microbatches: microbatches of a step.
      usable: bytes of a device that a program may use; 0 if unknown.
      held: the state.
      programs: the compiled programs, the training step first.
      expected: what a step should send by the formula.
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
        """Returns whether every program fits, or None if that is unknown.

        It is unknown if the memory of a device is unknown. It is also unknown if the devices are simulated,
        the state fits, and a program does not fit by the CPU compiler's figures.
        """
        if any(program.refused for program in self.programs):
            return False
        if not self.usable:
            return None
        if self.held.total() > self.usable:
            return False
        fits = all(program.peak <= self.usable for program in self.programs)
        return fits or (None if self.simulated() else False)

    def simulated(self) -> bool:
        """Returns whether CPU devices simulate those of the target."""
        return self.compiler == CPU_COMPILER

    def to_plain(self) -> dict[str, Any]:
        """Returns the plan as JSON holds it."""
        return dataclasses.asdict(self) | {"fits": self.fits()}


def make_plan(config: RunConfig, target: Target, programs: Sequence[str] = TRAINING) -> Plan:
    """Compiles a config's programs for a target.

    Args:
      config: the run.
      target: the devices.
      programs: names in PROGRAMS, of which those that the run has are compiled; if empty, only the state's
        sizes and the formula are computed.

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
        held=held(state, adapter_labels(array_options(config.optimizer, methods))),
        programs=[
            PROGRAMS[name](config, methods, state, mesh)
            for name in names_of(config, methods)
            if name in programs
        ],
        expected=expected(config, methods, state, mesh),
    )


def held(state: Any, adapters: Set[str]) -> Held:
    """Returns what one device holds of a state.

    Args:
      state: shapes with shardings.
      adapters: labels of the adapters' optimizer state.
    """
    groups = state.opt_state.inner_states
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
