"""How a run starts: from its newest good checkpoint, or from scratch if none was lost."""

import dataclasses
from typing import Any

from etils import epath

from mora_jax.errors import InputError
from mora_jax.transform import Methods
from train.config.run import RunConfig
from train.console.terminal import log, warn
from train.run import base
from train.run.checkpoint import Checkpoints
from train.run.folder import claim, diverged_at, read_config
from train.run.meta import check_data, read_meta
from train.run.metrics import LINES, read_metrics
from train.run.model import load_initial, load_initial_adapter
from train.run.session import Run, diverged, stop_early
from train.run.state import assign_methods, fresh_state, named_base, restore_state
from train.run.tokenizer import keep_tokenizer
from train.runtime import agree
from train.step import spikes
from train.step.state import TrainState


def start(run: Run) -> tuple[TrainState, Methods, dict[str, Any] | None]:
    """Returns the state to train from, its methods, and the evaluation saved with it.

    The state is that of the newest good checkpoint, or a fresh one.

    Raises:
      InputError: if the run has checkpoints that cannot be used.
      Diverged: if the run was killed after it diverged, before it reported this.
    """
    config, saved = run.config, run.saved
    step, damaged = saved.latest_good()
    if step is None:
        _check_nothing_lost(config, saved, damaged)
    warn(f"{what}; using an older checkpoint" for what in damaged)
    if step is None:
        methods, params = assign_methods(config), load_initial(config, run.info, run.mesh)
        initial, adapters = load_initial_adapter(config, methods, params)
        named = named_base(config, methods) if base.is_same(params, initial, methods) else None
        if named:
            agree.check_equal({f"hash of {name} in {config.init_from}": h for name, h in named.files})
            saved.refer_to(named)
        return fresh_state(config, methods, run.mesh, initial, adapters), methods, None
    check_data(saved, step, run.info, resume=True)
    log(f"{config.run_dir} holds a run: resuming after {step} of {config.steps} updates")
    reported = diverged_at(config)  # read by every process before process 0 may write it
    state, methods = restore_state(config, saved, step, run.mesh)
    if spikes.exhausted(config.bad_steps, state.spikes) and reported != step:
        stop_early(run, step, diverged(config, step, "before the last kill"))
    state = dataclasses.replace(state, spikes=spikes.with_patience(config.bad_steps, state.spikes))
    return state, methods, read_meta(saved, step)["evaluation"]


def claim_folder(run: Run, state: TrainState, methods: Methods) -> None:
    """Claims the folder for the run. Call it once all input is checked: bad input leaves no run behind."""
    keep_tokenizer(run.config.run_dir, run.info)
    claim(run.config)
    run.saved.remove_unfinished()
    if run.config.init_from and not run.saved.steps():
        # Saved before anything is logged: the source of a warm start may be trained further meanwhile.
        step = int(state.step)
        run.save(step, state, methods)
        run.saved.wait()


def _check_nothing_lost(config: RunConfig, saved: Checkpoints, damaged: list[str]) -> None:
    """Raises InputError if a run had checkpoints and none is good: starting from scratch would erase it."""
    remedy, sealed = "restore the files, or choose another --run-dir", len(saved.steps())
    if sealed:
        problem = damaged[-1] if damaged else "see process 0"
        raise InputError(
            f"{config.run_dir} has {sealed} checkpoints and none is good, such as: {problem}; {remedy}"
        )
    lines = epath.Path(config.run_dir) / LINES
    if not lines.exists():
        return
    updates = max((line["step"] + 1 for line in read_metrics(str(lines)) if "loss" in line), default=0)
    # A run that was killed before its first update may have no config either.
    every = read_config(config.run_dir).checkpoint.every if updates else 0
    if 0 < 2 * every < updates:  # the second save waits for the first
        raise InputError(
            f"{config.run_dir} has logged {updates} updates, saved every {every}, but has no checkpoint; "
            f"{remedy}"
        )
