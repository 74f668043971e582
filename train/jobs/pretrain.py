"""Pretraining, read from top to bottom."""

import collections
import dataclasses
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from mora_jax import sharding
from mora_jax.errors import InputError
from mora_jax.io import read_json
from mora_jax.models.llama import Llama
from mora_jax.transform import Methods
from train.config.run import RunConfig
from train.console.exits import Diverged, Preempted, Stopped, naming
from train.console.terminal import tell, warn
from train.data.rows.info import DataInfo, load_info, unigram_perplexity
from train.data.rows.read import train_batches
from train.jobs.evaluate import Abandoned, Score, check_mesh, check_vocabulary, evaluate
from train.jobs.plot import plot_loss
from train.run.checkpoint import Checkpoints
from train.run.folder import check_free, claim, diverged_at, note_diverged, open_checkpoints, read_config
from train.run.meta import build_meta, check_data, group_type, read_meta
from train.run.metrics import LINES, Metrics, read_metrics
from train.run.model import load_initial
from train.run.state import assign_methods, fresh_state, restore_state
from train.run.step_log import Watch
from train.run.upload import mirrored
from train.runtime import backend
from train.runtime.preempt import Stop
from train.step import spikes
from train.step.step import TrainState, restart_step, train_step
from train.storage import lock
from train.storage.files import write_whole

SUMMARY = "summary.json"


def pretrain(config: RunConfig, resume: bool = True) -> dict[str, Any]:
    """Trains from the newest good checkpoint in the run's folder, or from the first step, to the last.

    Writes metrics.jsonl, tensorboard/, checkpoints/, loss.png and summary.json into the run's folder.

    Args:
      config: what to train.
      resume: whether to go on with a run that the folder holds already; else it is refused.

    Returns:
      The summary: validation_loss, validation_perplexity, restarts, tokens_per_second and more.

    Raises:
      InputError: for a config, data set or folder that cannot be trained with.
      Stopped: if the run ends early, with a checkpoint: Preempted or Diverged.
    """
    backend.set_flags(config)  # before anything starts JAX
    # First: processes wait two minutes for each other's devices, and data may take longer to be copied.
    mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
    info = load_info(config.data.directory)
    check(config, info, mesh)
    check_free(config, resume)
    warn(config.warnings())
    with (
        jax.set_mesh(mesh),
        lock.alone(config.run_dir) as check_there,
        backend.compiled_programs(config),
        Stop(mesh) as stop,  # outside of the checkpoints: their last save can be cut short, too
        mirrored(config.run_dir) as mirror,
        open_checkpoints(config, mirror.take_up) as saved,
    ):
        return train(config, info, mesh, stop, saved, check_there, mirror.folder)


def train(
    config: RunConfig,
    info: DataInfo,
    mesh: Mesh,
    stop: Stop,
    saved: Checkpoints,
    check_there: Callable[[], None],
    growing: Path,
) -> dict[str, Any]:
    """What `pretrain` does, once the run's folder is its own, and while `check_there` finds it there; the
    summary. `growing` is for what grows."""
    state, methods, score = start(config, saved, info, mesh)
    first = int(state.step)
    if first == config.steps and (summary := told_summary(config)):
        return summary
    held = sharding.local_rows(mesh, config.batch_size)
    batches = train_batches(info, config.batch_size, config.seed, first, held)
    batches = on_devices(batches, mesh, config.batch_size)
    metrics = Metrics(str(growing), config.steps, first, config.log.wandb, evaluated=score is not None)
    with metrics:
        claim(config)  # only now, so that bad input leaves no half-made run behind
        saved.remove_unfinished()
        if config.init_from and not saved.steps():
            # Before anything is told: what it was made from may be trained on, and begin it otherwise again.
            saved.save(first, state, build_meta(config, methods, info, first))
            saved.wait()
        watch = Watch(metrics, config.tokens_per_step())
        for step in itertools.count(first):  # so many updates are done
            if due(config.eval.every, step, config) and score is None:
                watch.drain()
                score = score_of(config, methods, state, info, mesh, stop)
                if score:
                    watch.note(step - 1, evaluation_note(score))
            saving = step > first and due(config.checkpoint.every, step, config)
            stopping = stop.asked()
            restarting = config.restarts_at(step)
            if saving or stopping or restarting:
                watch.drain()  # first: the bad step that ends the run may be among those in flight
            ending = early_end(config, watch, stopping, step)
            if saving or (ending and step > first):
                watch.drain()
                check_there()
                saved.save(step, state, build_meta(config, methods, info, step, to_plain(score)))
            if ending:
                leave(config, saved, step, ending)
            if step == config.steps:
                break
            if restarting:
                state, cleared = restart_step(config, methods, state)
                methods = methods.after_restart()
                watch.note(step, restart_note(config, methods, step, float(cleared)))
            tokens_BT, data_wait = next_batch(batches)
            state, scalars = train_step(config, methods, state, tokens_BT)
            watch.follow(step, scalars, data_wait)
            saved.poll()
            score = None  # of the state before
    assert score is not None
    saved.wait()  # a run with a summary is one whose last checkpoint is there
    return conclude(config, info, score, watch.median_rate())


def check(config: RunConfig, info: DataInfo, mesh: Mesh) -> None:
    """Raises InputError for whatever config, data and devices do not agree on."""
    check_vocabulary(info, config.model.vocab_size)
    if info.sequence_length != config.data.sequence_length:
        raise InputError(
            f"{info.directory} has rows of {info.sequence_length} tokens, not data.sequence_length "
            f"{config.data.sequence_length}"
        )
    check_mesh(config, mesh)
    if config.compute.attention == "cudnn" and mesh.devices.flat[0].platform != "gpu":
        raise InputError("compute.attention cudnn needs an NVIDIA GPU, and there is none here; use xla")
    if config.compute.attention == "splash" and mesh.devices.flat[0].platform != "tpu":
        raise InputError("compute.attention splash needs a TPU, and there is none here; use cudnn or xla")


def start(
    config: RunConfig, saved: Checkpoints, info: DataInfo, mesh: Mesh
) -> tuple[TrainState, Methods, Score | None]:
    """The state to go on from, the newest good checkpoint's or a fresh one, and its score if there is one."""
    step, damaged = saved.latest_good()
    if step is None:
        check_nothing_lost(config, saved, damaged)
    warn(f"{what}; using an older checkpoint" for what in damaged)
    if step is None:
        methods = assign_methods(config)
        return fresh_state(config, methods, mesh, load_initial(config, mesh)), methods, None
    check_data(saved, step, info, resume=True)
    tell(f"{config.run_dir} holds a run: going on after {step} of {config.steps} updates")
    told = diverged_at(config)  # by every process, before one of them tells
    state, methods = restore_state(config, saved, step, mesh)
    if spikes.at_an_end(config.bad_steps, state.guard) and told != step:  # it was killed before it said so
        leave(config, saved, step, diverged(config, step, "before the last kill"))
    found = read_meta(saved, step)["evaluation"]
    seen = spikes.try_again(config.bad_steps, state.guard)
    return dataclasses.replace(state, guard=seen), methods, Score(**found) if found else None


def check_nothing_lost(config: RunConfig, saved: Checkpoints, damaged: list[str]) -> None:
    """Raises InputError where a run had checkpoints and none is good: beginning anew would erase it."""
    mend, sealed = "put back the files, or choose another --run-dir", len(saved.steps())
    if sealed:
        problem = damaged[-1] if damaged else "process 0 says why"
        raise InputError(
            f"{config.run_dir} has {sealed} checkpoints and none is good, such as: {problem}; {mend}"
        )
    told = epath.Path(config.run_dir) / LINES
    if not told.exists():
        return
    updates = max((line["step"] + 1 for line in read_metrics(str(told)) if "loss" in line), default=0)
    # One that was killed before its first update may have no config either.
    every = read_config(config.run_dir).checkpoint.every if updates else 0
    if 0 < 2 * every < updates:  # the second save waits for the first
        raise InputError(
            f"{config.run_dir} tells of {updates} updates, saved every {every}, and has no checkpoint; {mend}"
        )


def early_end(config: RunConfig, watch: Watch, stopping: bool, step: int) -> Stopped | None:
    """Why the run ends after `step` updates, if it does so before it is finished."""
    if watch.bad_in_a_row >= config.bad_steps.patience:
        return diverged(config, step, watch.last_bad)
    if stopping:
        return Preempted(
            f"{config.run_dir}: stopped after {step} of {config.steps} updates; the same command goes on"
        )
    return None


def diverged(config: RunConfig, step: int, seen: str) -> Diverged:
    """The end of a run whose patience is, after `step` updates; `seen` is what is known of its bad steps."""
    return Diverged(
        f"{config.run_dir}: {config.bad_steps.patience} bad steps in a row ({seen}); stopped "
        f"with a checkpoint after {step} updates. The same command tries the batches that follow; "
        f"another learning rate needs a new run: --init-from {config.run_dir} --run-dir ..."
    )


def leave(config: RunConfig, saved: Checkpoints, step: int, why: Stopped) -> NoReturn:
    """Ends the run before its time, once its last checkpoint is there. Raises `why`."""
    saved.wait()
    if isinstance(why, Diverged):
        note_diverged(config, step)
    raise why


def next_batch(batches: Iterator[jax.Array]) -> tuple[jax.Array, float]:
    """The next batch, and the seconds waited for it."""
    asked = time.perf_counter()
    return next(batches), time.perf_counter() - asked


def on_devices(batches: Iterator[np.ndarray], mesh: Mesh, rows: int) -> Iterator[jax.Array]:
    """Moves each global batch to the devices, this process its own rows, one step before it is asked for."""
    ahead: collections.deque[jax.Array] = collections.deque()
    for batch_BT in batches:
        ahead += sharding.to_global(mesh, rows, batch_BT)
        if len(ahead) > 1:
            yield ahead.popleft()


def due(every: int, step: int, config: RunConfig) -> bool:
    """Whether what happens every so many updates happens after `step` of them; the last one always counts."""
    return step == config.steps or (step > 0 and every > 0 and step % every == 0)


def score_of(
    config: RunConfig, methods: Methods, state: TrainState, info: DataInfo, mesh: Mesh, stop: Stop
) -> Score | None:
    """The validation score of a state; None if the run was asked to stop meanwhile."""
    model = Llama(config.model, config.compute)
    try:
        return evaluate(model, methods, state.params, state.adapters, info, config.eval, mesh, stop.asked)
    except Abandoned:
        return None


def to_plain(score: Score | None) -> dict[str, Any] | None:
    """A score as JSON holds it; one that is not finite is found again when it is needed."""
    return dataclasses.asdict(score) if score and math.isfinite(score.loss) else None


def evaluation_note(score: Score) -> dict[str, Any]:
    """What is logged of an evaluation."""
    return {"validation_loss": score.loss, "validation_perplexity": score.perplexity}


def restart_note(config: RunConfig, methods: Methods, step: int, cleared: float) -> dict[str, Any]:
    """What is logged of the restart before update `step`; `methods` are those after it."""
    return {
        "restart": config.restarts_before(step + 1),
        "group_type": group_type(methods),
        "optimizer_cleared": cleared,
    }


def told_summary(config: RunConfig) -> dict[str, Any] | None:
    """The summary of a run that has ended; None where there is none that can be read."""
    try:
        found = read_json(epath.Path(config.run_dir) / SUMMARY)
    except InputError:
        return None
    return found if isinstance(found, dict) else None


def told_rate(folder: epath.Path) -> float:
    """Tokens a second of the median update that programs before this one told of; 0 where none did."""
    told = read_metrics(str(folder / LINES))
    return statistics.median(
        [line["tokens_per_second"] for line in told if "tokens_per_second" in line] or [0]
    )


def conclude(config: RunConfig, info: DataInfo, score: Score, tokens_per_second: float) -> dict[str, Any]:
    """Process 0 draws loss.png and writes summary.json; the summary is returned."""
    folder = epath.Path(config.run_dir)
    summary = {
        "steps": config.steps,
        "tokens": config.steps * config.tokens_per_step(),
        "restarts": config.restarts_before(config.steps),
        "validation_loss": score.loss,
        "validation_perplexity": score.perplexity,
        "unigram_perplexity": unigram_perplexity(info),
        "tokens_per_second": tokens_per_second or told_rate(folder),
        "device": jax.devices()[0].device_kind,
    }
    if jax.process_index() > 0:
        return summary
    with naming(folder / "loss.png"):
        plot_loss(str(folder / LINES), str(folder / "loss.png"))
    write_whole(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")
    return summary
