"""A run that this program trains: its folder locked, signals handled, checkpoints open, logs uploaded."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
from jax.sharding import Mesh

from mora_jax.transform import Methods
from train.config.run import RunConfig
from train.console.exits import Diverged, Preempted, Stopped
from train.data.rows.info import DataInfo
from train.run import base
from train.run.checkpoint import Checkpoints
from train.run.folder import note_diverged, open_checkpoints
from train.run.meta import build_meta
from train.run.step_log import StepLog
from train.run.upload import uploading
from train.runtime import backend
from train.runtime.preempt import Stop
from train.step.state import TrainState
from train.storage.lock import lock_run


@dataclasses.dataclass(frozen=True)
class Run:
    """A run while this program trains it.

    Attributes:
      config: its config.
      info: its data set.
      mesh: the devices.
      stop: says whether a signal asked the run to stop.
      saved: its checkpoints.
      log_dir: the folder of its logs, on a disk.
      check_folder: raises InputError if the run's folder was removed.
    """

    config: RunConfig
    info: DataInfo
    mesh: Mesh
    stop: Stop
    saved: Checkpoints
    log_dir: Path
    check_folder: Callable[[], None]

    def save(
        self, step: int, state: TrainState, methods: Methods, evaluation: dict[str, Any] | None = None
    ) -> None:
        """Saves a checkpoint in the background.

        Args:
          step: updates done.
          state: the state after them.
          methods: what is done with each parameter.
          evaluation: the score of this very state, if it was evaluated.
        """
        self.check_folder()
        meta = build_meta(self.config, methods, self.info, step, evaluation)
        rest, shared = base.split(state, methods)
        self.saved.save(step, rest, meta, shared, self.config.restarts_before(step))


@contextlib.contextmanager
def open_run(config: RunConfig, info: DataInfo, mesh: Mesh) -> Iterator[Run]:
    """Opens a run for training.

    Raises:
      InputError: if another program trains it, or its folder cannot be written to.
    """
    with (
        jax.set_mesh(mesh),
        lock_run(config.run_dir) as check_folder,
        backend.compiled_programs(config, mesh),
        Stop(mesh) as stop,  # entered before the checkpoints: a signal must be able to end their last save
        uploading(config.run_dir) as logs,
        open_checkpoints(config, logs.upload) as saved,
    ):
        yield Run(config, info, mesh, stop, saved, logs.log_dir, check_folder)


def due(every: int, step: int, config: RunConfig) -> bool:
    """Returns whether something that happens every `every` updates happens after `step` of them.

    The last update always counts.
    """
    return step == config.steps or (step > 0 and every > 0 and step % every == 0)


def save_or_stop(
    run: Run, log: StepLog, step: int, state: TrainState, methods: Methods, evaluation: dict[str, Any] | None
) -> None:
    """Saves a checkpoint if one is due. Ends the run, with a checkpoint, if it diverged or is asked to stop.

    Args:
      run: the run.
      log: the log of its steps.
      step: updates done.
      state: the state after them.
      methods: what is done with each parameter.
      evaluation: the score of this very state, if it was evaluated.

    Raises:
      Stopped: Diverged or Preempted, after the checkpoint is saved.
    """
    saving = log.steps > 0 and due(run.config.checkpoint.every, step, run.config)
    asked = run.stop.asked()
    if saving or asked or run.config.restarts_at(step):
        log.drain()  # the last bad step of a run that diverges may be in flight
    why = _early_end(run.config, log, asked, step)
    if saving or (why and log.steps > 0):
        log.drain()
        run.save(step, state, methods, evaluation)
    if why:
        stop_early(run, step, why)


def stop_early(run: Run, step: int, why: Stopped) -> NoReturn:
    """Ends a run early, once its last checkpoint is saved. Raises `why`."""
    run.saved.wait()
    if isinstance(why, Diverged):
        note_diverged(run.config, step)
    raise why


def diverged(config: RunConfig, step: int, seen: str) -> Diverged:
    """Returns the end of a run that diverged after `step` updates; `seen` describes its bad steps."""
    return Diverged(
        f"{config.run_dir}: {config.bad_steps.patience} bad steps in a row ({seen}); stopped with a "
        f"checkpoint after {step} updates. The same command tries the next batches; another learning rate "
        f"needs a new run: --init-from {config.run_dir} --run-dir ..."
    )


def _early_end(config: RunConfig, log: StepLog, asked: bool, step: int) -> Stopped | None:
    """Returns why the run ends after `step` updates, None if it does not."""
    if log.bad_in_a_row >= config.bad_steps.patience:
        return diverged(config, step, log.last_bad)
    if asked:
        return Preempted(
            f"{config.run_dir}: stopped after {step} of {config.steps} updates; the same command resumes"
        )
    return None
