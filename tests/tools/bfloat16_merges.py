"""Measures what merging into a bfloat16 base would lose: a run with restarts, and the same with rounding.

    python tests/tools/bfloat16_merges.py CONFIG [flags]

The config has restarts, and so a float32 base. In the second run the base is rounded to bfloat16 at the
start and after each restart, as if it were held so. Printed are the validation perplexity of both runs, and
for each restart of the second what rounding leaves of the merged update dW: its projection on dW, the share
of dW's entries that change nothing, and the error relative to dW.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax import sharding
from mora_jax.models.llama import Llama
from train.config import flags
from train.config.run import RunConfig
from train.data.rows.info import load_info
from train.data.rows.read import train_batches
from train.jobs.evaluate import evaluate
from train.run import base
from train.run.model import load_initial
from train.run.state import assign_methods, fresh_state
from train.step.spec import spec_of
from train.step.state import TrainState
from train.step.step import restart_step, train_step


def main() -> None:
    config = flags.read_config(sys.argv[1], sys.argv[2:])
    for rounds in (False, True):
        print(
            f"base {'rounded to bfloat16' if rounds else 'float32'}: perplexity {train(config, rounds):.4f}"
        )


def train(config: RunConfig, rounds: bool) -> float:
    """Trains a run and returns its validation perplexity."""
    info, mesh, spec = load_info(config.data.directory), sharding.make_mesh(1), spec_of(config)
    methods = assign_methods(config)
    state = fresh_state(config, methods, mesh, load_initial(config, info, mesh))
    state = rounded(state, methods) if rounds else state
    rows = np.arange(config.batch_size)
    batches = train_batches(info, config.batch_size, config.seed, 0, rows, config.data.skip_rows)
    for step, batch in zip(range(config.steps), batches, strict=False):
        if config.restarts_at(step):
            before = jax.tree.map(np.asarray, base.split(state, methods)[1])
            state, _ = restart_step(spec, methods, state)
            methods = methods.after_restart()
            if rounds:
                report(step, before, base.split(state, methods)[1])
                state = rounded(state, methods)
        state, _ = train_step(spec, methods, state, batch)
    model = Llama(config.model, config.compute)
    return evaluate(model, methods, state.params, state.adapters, info, config.eval, mesh).perplexity


def rounded(state: TrainState, methods: Any) -> TrainState:
    """Returns a state whose base has the values of bfloat16, in float32."""
    rest, shared = base.split(state, methods)
    return base.join(rest, jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(jnp.float32), shared))


def report(step: int, before: Any, after: Any) -> None:
    """Prints what rounding leaves of the update that a restart has merged into a rounded base."""
    sums = np.zeros(5)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        update = np.asarray(new, np.float64) - old
        kept = np.asarray(new.astype(jnp.bfloat16), np.float64) - old
        error = kept - update
        sums += (update**2).sum(), (update * kept).sum(), (error**2).sum(), (kept == 0).sum(), old.size
    whole, left, error, unchanged, count = sums
    print(
        f"update {step}: {left / whole:.3f} of dW is left, {unchanged / count:.3f} of its entries change "
        f"nothing, error {np.sqrt(error / whole):.3f}, dW {np.sqrt(whole / count):.1e} an entry",
        flush=True,
    )


if __name__ == "__main__":
    main()
