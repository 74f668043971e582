"""Pretraining, read from top to bottom."""

import collections
import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from mora_jax import sharding
from mora_jax.errors import InputError
from mora_jax.io import json_text, read_json
from mora_jax.models.batch import Batch
from mora_jax.models.llama import Llama
from mora_jax.transform import Methods
from train.config import run as run_config
from train.config.adapter import with_adapter
from train.config.run import RunConfig
from train.console.exits import Diverged
from train.console.terminal import warn
from train.data.rows.info import DataInfo, check_trainable, load_info, unigram_perplexity
from train.data.rows.read import train_batches
from train.jobs.evaluate import Abandoned, Score, check_mesh, check_vocabulary, evaluate
from train.jobs.plot import plot_loss
from train.run.folder import PICTURE, SUMMARY, absolute, check_free
from train.run.meta import group_type
from train.run.metrics import LINES, Metrics, read_metrics
from train.run.resume import claim_folder, start
from train.run.session import Run, due, open_run, save_or_stop, stop_early
from train.run.step_log import StepLog
from train.runtime import agree, backend
from train.step.spec import spec_of
from train.step.state import TrainState
from train.step.step import orient_step, restart_step, train_step
from train.storage import buckets
from train.storage.files import naming_errors, write_whole


def pretrain(config: RunConfig, resume: bool = True) -> dict[str, Any]:
    """Trains a run to its last step, from its newest good checkpoint or from scratch.

    Writes metrics.jsonl, tensorboard/, checkpoints/, loss.png and summary.json into the run's folder.

    Args:
      config: what to train.
      resume: whether to resume a run that the folder holds; otherwise it is refused.

    Returns:
      The summary: validation_loss, validation_perplexity, restarts, tokens_per_second and more.

    Raises:
      InputError: for a config, data set or folder that cannot be trained with.
      Stopped: if the run ends early, with a checkpoint: Preempted or Diverged.
    """
    config = with_adapter(absolute(config))
    backend.set_flags(config.deterministic)  # before anything starts JAX
    buckets.configure()
    agree.check_config(config, resume)
    # Before the data: processes wait two minutes for each other's devices, and data may take longer to copy.
    mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
    info = load_info(config.data.directory)
    agree.check_data(info)
    check_trainable(info)
    config = config.in_steps(info.rows["train"])
    check(config, info, mesh)
    check_free(config, resume)
    warn([*config.warnings(), *repeats(config, info)])
    with open_run(config, info, mesh) as run:
        return train(run)


def train(run: Run) -> dict[str, Any]:
    """Trains an opened run to its last step and returns the summary."""
    config, spec = run.config, spec_of(run.config)
    state, methods, evaluation = start(run)
    score = Score(**evaluation) if evaluation else None
    first = int(state.step)
    if first == config.steps and (summary := saved_summary(config)):
        return summary
    batches = batches_on_devices(run, first)
    evaluated = score is not None
    plain = run_config.to_plain(config)
    with Metrics(
        str(run.log_dir), config.steps, first, config.log.wandb, plain, evaluated=evaluated
    ) as metrics:
        claim_folder(run, state, methods)
        log = StepLog(metrics, config.tokens_per_step())
        for step in itertools.count(first):  # `step` updates are done
            if due(config.eval.every, step, config) and score is None:
                log.drain()
                score = score_of(run, methods, state)
                if score:
                    log.note(step - 1, evaluation_note(score))
            save_or_stop(run, log, step, state, methods, to_plain(score))
            if step == config.steps:
                break
            if config.restarts_at(step):
                state, cleared = restart_step(spec, methods, state)
                methods = methods.after_restart()
                log.note(step, restart_note(config, methods, step, float(cleared)))
            batch, data_wait = next_batch(batches)
            if (step == 0 or config.restarts_at(step)) and any(methods.orientable()):
                state = orient_step(spec, methods, state, batch)
            state, scalars = train_step(spec, methods, state, batch)
            log.add(step, scalars, data_wait)
            run.saved.poll()
            score = None  # it was that of the previous state
    assert score is not None
    run.saved.wait()  # a run with a summary has its last checkpoint
    check_trained(run, score, int(state.spikes.skipped))
    return conclude(run, score, log.median_rate())


def check(config: RunConfig, info: DataInfo, mesh: Mesh) -> None:
    """Raises InputError if config, data and devices do not fit each other."""
    check_rows(config, info)
    unigram_perplexity(info)  # the summary needs it: a damaged file is found now and not at the end
    check_mesh(config, mesh)
    platform = mesh.devices.flat[0].platform
    if config.compute.attention == "cudnn" and platform != "gpu":
        raise InputError("compute.attention cudnn needs an NVIDIA GPU, and this machine has none; use xla")
    if config.compute.attention == "splash" and platform != "tpu":
        raise InputError("compute.attention splash needs a TPU, and this machine has none; use cudnn or xla")


def check_rows(config: RunConfig, info: DataInfo) -> None:
    """Raises InputError if a config does not fit the rows of its data set."""
    check_vocabulary(info, config.model.vocab_size)
    if info.sequence_length != config.data.sequence_length:
        raise InputError(
            f"{info.directory} has rows of {info.sequence_length} tokens, not data.sequence_length "
            f"{config.data.sequence_length}"
        )
    if not info.joined and info.sequence_length > config.model.max_position_embeddings:
        raise InputError(
            f"{info.directory} has examples in rows of {info.sequence_length} tokens, and beyond "
            f"{config.model.max_position_embeddings} model.rope.type dynamic scales by the length of the row"
        )


def repeats(config: RunConfig, info: DataInfo) -> list[str]:
    """Returns a sentence if the run is longer than its data."""
    rows, epochs = info.rows["train"], config.repeats(info.rows["train"])
    if epochs <= 1 or rows < config.batch_size:  # fewer rows than one batch are refused
        return []
    return [f"the run reads the {rows:,} training rows {epochs:.2f} times (epochs)"]


def batches_on_devices(run: Run, first: int) -> Iterator[Batch]:
    """Returns the global batches from update `first` on, each moved to the devices one step ahead."""
    rows = run.config.batch_size
    held = sharding.local_rows(run.mesh, rows)
    skip = run.config.data.skip_rows
    mask = run.config.data.document_mask
    return on_devices(train_batches(run.info, rows, run.config.seed, first, held, skip, mask), run.mesh, rows)


def on_devices(batches: Iterator[Batch], mesh: Mesh, rows: int) -> Iterator[Batch]:
    """Yields global batches of `rows` sequences on the devices, made of each process's own rows."""
    ahead: collections.deque[Batch] = collections.deque()
    for batch in batches:
        ahead.append(sharding.to_global(mesh, rows, batch))
        if len(ahead) > 1:
            yield ahead.popleft()


def next_batch(batches: Iterator[Batch]) -> tuple[Batch, float]:
    """Returns the next batch and the seconds waited for it."""
    asked = time.perf_counter()
    return next(batches), time.perf_counter() - asked


def score_of(run: Run, methods: Methods, state: TrainState) -> Score | None:
    """Returns the validation score of a state, None if the run was asked to stop meanwhile."""
    config = run.config
    model, arrays = Llama(config.model, config.compute), (state.params, state.adapters)
    mask, stop = config.data.document_mask, run.stop.asked
    try:
        return evaluate(model, methods, *arrays, run.info, config.eval, run.mesh, mask, stop)
    except Abandoned:
        return None


def to_plain(score: Score | None) -> dict[str, Any] | None:
    """Returns a score as JSON holds it, None for one that is not finite: it is computed again if needed."""
    return dataclasses.asdict(score) if score and math.isfinite(score.loss) else None


def evaluation_note(score: Score) -> dict[str, Any]:
    """Returns what is logged of an evaluation."""
    return {"validation_loss": score.loss, "validation_perplexity": score.perplexity}


def restart_note(config: RunConfig, methods: Methods, step: int, cleared: float) -> dict[str, Any]:
    """Returns what is logged of the restart before update `step`. `methods` are those after it."""
    return {
        "restart": config.restarts_before(step + 1),
        "group_type": group_type(methods),
        "optimizer_cleared": cleared,
    }


def check_trained(run: Run, score: Score, skipped: int) -> None:
    """Ends a run whose updates were all skipped, or whose result is no model, as one that diverged.

    Raises:
      Diverged: in these cases.
    """
    steps, found = run.config.steps, ""
    if skipped == steps:
        found = f"all {steps} updates were skipped, since their loss or gradient was not finite or a spike"
    elif not math.isfinite(score.loss):
        found = f"the validation loss after {steps} updates is {score.loss}"
    if found:
        why = f"{run.config.run_dir}: {found}. Train it anew with a lower learning rate or other data"
        stop_early(run, steps, Diverged(f"{why}: --run-dir ..."))


def saved_summary(config: RunConfig) -> dict[str, Any] | None:
    """Returns the summary of a finished run, None if there is none that can be read."""
    try:
        found = read_json(epath.Path(config.run_dir) / SUMMARY)
    except InputError:
        return None
    if not isinstance(found, dict):
        return None
    loss = found.get("validation_loss")
    return found if isinstance(loss, float) and math.isfinite(loss) else None


def conclude(run: Run, score: Score, tokens_per_second: float) -> dict[str, Any]:
    """Returns the summary. Process 0 draws loss.png and writes summary.json."""
    config, folder = run.config, epath.Path(run.config.run_dir)
    summary = {
        "steps": config.steps,
        "tokens": config.steps * config.tokens_per_step(),
        "epochs": config.repeats(run.info.rows["train"]),
        "restarts": config.restarts_before(config.steps),
        "validation_loss": score.loss,
        "validation_perplexity": score.perplexity,
        "unigram_perplexity": unigram_perplexity(run.info),
        "tokens_per_second": tokens_per_second or logged_rate(folder),
        "device": jax.devices()[0].device_kind,
    }
    if jax.process_index() > 0:
        return summary
    draw(folder)
    write_whole(folder / SUMMARY, json_text(summary, indent=2) + "\n")
    return summary


def draw(folder: epath.Path) -> None:
    """Draws loss.png, or warns that the log cannot be read: a finished run needs its summary."""
    try:
        with naming_errors(folder / PICTURE):
            plot_loss(str(folder / LINES), str(folder / PICTURE))
    except InputError as error:
        warn([f"loss.png is not drawn: {error}"])


def logged_rate(folder: epath.Path) -> float:
    """Returns tokens a second of the median update that earlier programs logged, 0 if none can be read."""
    try:
        lines = read_metrics(str(folder / LINES))
    except InputError:
        return 0.0
    return statistics.median(
        [line["tokens_per_second"] for line in lines if "tokens_per_second" in line] or [0]
    )
