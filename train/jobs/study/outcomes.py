"""What the folders of a study say of its runs. Nothing else is remembered: a study can be killed any time."""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from etils import epath

from mora_jax.errors import InputError
from mora_jax.io import json_text, read_json
from train.config.run import to_plain
from train.config.study import Study, StudyRun
from train.data.rows.info import load_info
from train.run.folder import CHECKPOINTS, CONFIG, DIVERGED, SUMMARY, check_same_config, read_config
from train.run.metrics import LINES, read_metrics
from train.storage.files import write_result

State = Literal["waiting", "unfinished", "finished", "diverged", "failed"]
# File in the study's folder that names its runs.
RUNS = "study.json"
# Bytes at the end of a log that hold its newest lines.
_TAIL = 1 << 13


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run has come to.

    Attributes:
      state: "unfinished" also covers a run that trains, is paused or was stopped.
      step: updates done.
      loss: validation loss at the end, in nats a token; None before.
      evaluations: validation loss after each number of updates; infinite for one that is not finite.
      tokens_per_second: median speed; None before the end.
      device: what it was trained on.
      note: why it failed.
    """

    state: State = "waiting"
    step: int = 0
    loss: float | None = None
    evaluations: Mapping[int, float] = dataclasses.field(default_factory=dict)
    tokens_per_second: float | None = None
    device: str = ""
    note: str = ""

    @property
    def ended(self) -> bool:
        """Whether the run cannot be trained further, in this start of the study."""
        return self.state in ("finished", "diverged", "failed")

    @property
    def perplexity(self) -> float | None:
        """The validation perplexity at the end."""
        return None if self.loss is None else math.exp(min(self.loss, 700.0))


@dataclasses.dataclass(frozen=True)
class Newest:
    """The newest values in a run's log, None for those that its last lines lack."""

    done: int = 0
    loss: float | None = None
    tokens_per_second: float | None = None


def outcomes(study: Study) -> dict[str, Outcome]:
    """Returns the outcome of every run by name."""
    return {run.name: outcome(study, run) for run in study.runs}


def outcome(study: Study, run: StudyRun) -> Outcome:
    """Returns what the folder of a run says of it."""
    folder = epath.Path(run.config.run_dir)
    lines: list[dict[str, Any]] = []
    with contextlib.suppress(InputError):  # no log yet, or a damaged one, which the run itself reports
        lines = read_metrics(str(folder / LINES))
    done = max((line["step"] + 1 for line in lines if "loss" in line), default=0)
    found = {line["step"] + 1: line["validation_loss"] for line in lines if "validation_loss" in line}
    evaluations = {step: loss if math.isfinite(loss) else math.inf for step, loss in found.items()}
    summary = _mapping(folder / SUMMARY)
    loss = summary.get("validation_loss")
    if isinstance(loss, float) and math.isfinite(loss):
        rate, device = summary.get("tokens_per_second"), str(summary.get("device", ""))
        steps = summary.get("steps", done)
        return Outcome("finished", steps, loss, evaluations, rate, device)
    failure = _mapping(failure_file(study, run))
    if failure:
        return Outcome("failed", done, None, evaluations, note=str(failure.get("note", "")))
    diverged = _mapping(folder / DIVERGED)
    if diverged:
        return Outcome("diverged", done, None, evaluations)
    return Outcome("unfinished" if done else "waiting", done, None, evaluations)


def newest(run: StudyRun) -> Newest:
    """Returns the newest values of a run that trains. It reads only the end of the log."""
    found: dict[str, Any] = {}
    done = 0
    with contextlib.suppress(OSError, ValueError), Path(run.config.run_dir, LINES).open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL))
        for text in file.read().split(b"\n")[1 if size > _TAIL else 0 : -1]:
            line = json.loads(text)
            found.update(line)
            done = line["step"] + 1 if "loss" in line else done
    numbers = {name: value for name, value in found.items() if isinstance(value, float)}
    return Newest(done, numbers.get("loss"), numbers.get("tokens_per_second"))


def check_folders(study: Study) -> None:
    """Raises InputError if the study's folder, or that of a run, belongs to something else."""
    folder = Path(study.run_dir)
    if (folder / CONFIG).exists() or (folder / CHECKPOINTS).is_dir():
        raise InputError(f"{folder} is the folder of a run, not of a study; choose another --run-dir")
    held = _mapping(folder / RUNS).get("runs")
    names = {run.name for run in study.runs}
    if isinstance(held, list) and held and not names & {*map(str, held)}:
        raise InputError(
            f"{folder} holds another study, with runs such as {held[0]}; choose another --run-dir"
        )
    for run in study.runs:
        place = run.config.run_dir
        if epath.Path(place, CONFIG).exists():
            check_same_config(to_plain(read_config(place)), run.config, f"{place} holds a run")


def in_steps(study: Study) -> Study:
    """Returns the study with steps in the place of epochs, counted from the rows of each data set.

    Raises:
      InputError: for a data set that cannot be read, unless the run's own config has its steps.
    """
    return dataclasses.replace(study, runs=tuple(_in_steps(run) for run in study.runs))


def _in_steps(run: StudyRun) -> StudyRun:
    if not run.config.epochs:
        return run
    if epath.Path(run.config.run_dir, CONFIG).exists():
        steps = read_config(run.config.run_dir).steps
        return dataclasses.replace(run, config=dataclasses.replace(run.config, steps=steps, epochs=0.0))
    rows = load_info(run.config.data.directory, splits=()).rows["train"]
    return dataclasses.replace(run, config=run.config.in_steps(rows))


def keep_names(study: Study) -> None:
    """Writes into the folder which runs it holds."""
    text = json_text({"study": study.file, "runs": [run.name for run in study.runs]}, indent=2)
    write_result(Path(study.run_dir) / RUNS, text + "\n")


def log_file(study: Study, run: StudyRun) -> Path:
    """Returns the file that holds what a run prints."""
    return Path(study.run_dir) / "logs" / f"{run.name}.log"


def failure_file(study: Study, run: StudyRun) -> Path:
    """Returns the file that says why a run failed. The next start of the study removes it."""
    return log_file(study, run).with_suffix(".failed.json")


def keep_failure(study: Study, run: StudyRun, status: int, note: str) -> None:
    """Records that a run failed."""
    text = json_text({"status": status, "note": note})
    write_result(failure_file(study, run), text + "\n")


def _mapping(path: epath.PathLike) -> dict[str, Any]:
    try:
        found = read_json(path)
    except InputError:
        return {}
    return found if isinstance(found, dict) else {}
