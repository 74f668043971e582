"""Measures what the detection of bad steps costs: steps with and without it alternate in one process.

    python tests/tools/spikes_cost.py configs/demo.yaml

Wall time is that of the device. Processor time of all threads is more reliable on a CPU that others use.
"""

import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp

from mora_jax.models.batch import Batch
from train.config import flags
from train.run.state import assign_methods
from train.step import spikes, step
from train.step.spec import spec_of
from train.step.state import init_params, init_state

CLOCKS = {"wall time": time.perf_counter, "processor time": time.process_time}


def main(config_path: str, rounds: int = 30) -> None:
    """Prints the ratio of the median step with the detection to that without it."""
    config = flags.read_config(config_path)
    methods, spec = assign_methods(config), spec_of(config)
    shape = (config.batch_size, config.data.sequence_length)
    batch = Batch(jax.random.randint(jax.random.key(0), shape, 0, config.model.vocab_size))
    steps = {"judged": compiled(spikes.judge), "bare": compiled(all_good)}
    states = {name: init_state(spec, methods, init_params(spec)) for name in steps}
    spent: dict[str, list[list[float]]] = {name: [] for name in steps}
    for number in range(rounds + 2):
        for name in sorted(steps, reverse=number % 2 == 1):
            before = [clock() for clock in CLOCKS.values()]
            states[name], _ = jax.block_until_ready(steps[name](spec, methods, states[name], batch))
            after = [clock() for clock in CLOCKS.values()]
            if number >= 2:
                spent[name].append([b - a for a, b in zip(before, after, strict=True)])
    for index, clock in enumerate(CLOCKS):
        judged, bare = (statistics.median(row[index] for row in spent[name]) for name in ("judged", "bare"))
        print(f"{clock}: {judged:.4f} s judged, {bare:.4f} s bare, ratio {judged / bare:.4f}")
    costs = {
        name: steps[name].lower(spec, methods, states[name], batch).compile().cost_analysis()
        for name in steps
    }
    for what in ("flops", "bytes accessed"):
        print(f"{what}: ratio {costs['judged'][what] / costs['bare'][what]:.4f}, as the compiler counts")


def compiled(judge: Callable[..., Any]) -> Any:
    """Returns a training step with another detection."""

    @functools.wraps(step.train_step)
    def judged(*args: Any) -> Any:
        with mock.patch.object(spikes, "judge", judge):
            return step.train_step.__wrapped__(*args)

    return jax.jit(judged, static_argnums=(0, 1), donate_argnums=2)


def all_good(config: Any, seen: spikes.History, loss: jax.Array, norm: jax.Array, updated: Any) -> Any:
    """Judges every step as good, which the compiler sees."""
    return jnp.bool_(False), seen


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
