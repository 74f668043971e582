"""`mora study`, read from top to bottom: check, train or submit, and write the result."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from mora_jax.errors import InputError
from mora_jax.io import json_text
from train.config.study import Study
from train.console.terminal import log
from train.data.rows.info import check_trainable, load_info
from train.jobs.study import outcomes as folders
from train.jobs.study import pictures, slurm
from train.jobs.study.devices import devices
from train.jobs.study.live import LiveView
from train.jobs.study.queue import Queue
from train.jobs.study.table import Results, markdown, to_json
from train.jobs.study.verdicts import verdicts
from train.run.state import assign_methods
from train.storage import buckets, lock
from train.storage.files import make_folder, writable, write_result

TABLE, JSON, RATES, LOSSES = "table.md", "results.json", "rates.png", "loss.png"


def run_study(study: Study, gpus_per_run: int = 1, jobs: int = 1) -> tuple[Results, int]:
    """Trains the runs of a study on the devices of this machine, and writes its result.

    Args:
      study: the study.
      gpus_per_run: GPUs of each run.
      jobs: runs at a time on each GPU, or on a machine without any.

    Returns:
      The result, and how many runs failed or could not be trained.

    Raises:
      InputError: before any run starts, for runs that cannot be trained, or a folder that is in use or
        belongs to something else.
      Preempted: if a signal stopped the study.
    """
    places = devices(gpus_per_run, jobs)
    with claimed(study) as study, LiveView() as view:
        with Queue(study, places, jobs, view, lambda queue: write(results_of(queue))) as queue:
            queue.work()
        for run in queue.unfinished():
            view.say(f"{run.name}: not trained to its end, for want of a device or of another run")
        failed = [run for run in study.runs if queue.found[run.name].state == "failed"]
        results = results_of(queue)
        write(results)
    return results, len(failed) + len(queue.unfinished())


def submit_study(study: Study, options: str) -> str:
    """Submits the runs that have not ended to Slurm. Returns what sbatch printed.

    Raises:
      InputError: as `run_study` does; also for halving, and if sbatch is missing or refuses.
    """
    if study.halving:
        raise InputError("--submit slurm excludes halving: the jobs do not wait for each other")
    with claimed(study) as study:
        found = report(study)
        runs = [run for run in study.runs if found.verdicts[run.name].kind == "train"]
        if not runs:
            return "every run has ended: nothing to submit"
        return slurm.submit(study, runs, options)


def report(study: Study) -> Results:
    """Returns the result that the folders hold now, without training anything.

    Raises:
      InputError: if the folder, or that of a run, belongs to something else.
    """
    study = folders.in_steps(study)
    folders.check_folders(study)
    found = folders.outcomes(study)
    return Results(study, found, verdicts(study, found))


def write(results: Results) -> None:
    """Writes table.md, results.json, rates.png and loss.png into the study's folder."""
    folder = Path(results.study.run_dir)
    write_result(folder / TABLE, markdown(results))
    write_result(folder / JSON, json_text(to_json(results), indent=2) + "\n")
    pictures.draw_rates(results, folder / RATES)
    pictures.draw_losses(results, folder / LOSSES)


def results_of(queue: Queue) -> Results:
    """Returns the result as the queue knows it."""
    return Results(queue.study, dict(queue.found), dict(queue.verdicts))


@contextlib.contextmanager
def claimed(study: Study) -> Iterator[Study]:
    """Checks all runs and locks the study's folder. Yields the study with steps in the place of epochs."""
    if buckets.in_bucket(study.run_dir):
        raise InputError(f"run_dir {study.run_dir} is in a bucket; a study's folder is on a disk")
    check_runs(study)
    study = folders.in_steps(study)
    folder = Path(study.run_dir)
    with writable(folder, f"--run-dir {folder} cannot be made"):
        make_folder(folder)
    with lock.lock_file(folder / lock.LOCK, "--run-dir", study.run_dir):
        folders.check_folders(study)
        folders.keep_names(study)
        yield study


def check_runs(study: Study) -> None:
    """Raises InputError for a data set, or a rule or rank, that a run cannot be trained with."""
    for directory in dict.fromkeys(run.config.data.directory for run in study.runs):
        check_trainable(load_info(directory, splits=()))
    for run in study.runs:
        try:
            assign_methods(run.config)
        except InputError as error:
            raise InputError(f"{run.name}: {error}") from error
    log(f"{study.file}: {len(study.runs)} runs", every_process=True)
