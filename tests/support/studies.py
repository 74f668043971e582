"""Studies for tests: plain data, runs that are not trained, and their outcomes."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.config.study import Study, StudyRun, expand
from train.jobs.study.devices import Device
from train.jobs.study.outcomes import Outcome
from train.jobs.study.queue import Queue

ROOT = Path(__file__).parents[2]
FAKE_RUN = str(Path(__file__).parent / "fake_run.py")

LORA = {"method.name": "lora", "restart.every": 0, "schedule.kind": "cosine"}
PLAIN: dict[str, Any] = {
    "base": str(ROOT / "configs/demo.yaml"),
    "run_dir": "runs/s",
    "set": {"steps": 100, "eval.every": 2},
    "variants": {"LoRA": LORA, "ReMoRA": {"restart.every": 25}},
    "axes": {"optimizer.learning_rate": ["1e-3", "2e-3"]},
}


def study(folder: Path | None = None, **changes: Any) -> Study:
    """Returns the study of PLAIN with changes, in a folder."""
    plain = {**PLAIN, **changes} | ({"run_dir": str(folder)} if folder else {})
    return expand("study.yaml", plain)


def finished(loss: float, **rest: Any) -> Outcome:
    """Returns the outcome of a run that finished."""
    return Outcome("finished", 100, loss, tokens_per_second=100.0, device="a fake", **rest)


class Recorder:
    """A view that keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def show(self, queue: Queue) -> None:
        pass

    def say(self, sentence: str) -> None:
        self.said.append(sentence)


@dataclasses.dataclass
class Fakes:
    """Runs a study's queue with fake runs.

    Attributes:
      study: the study.
      losses: final loss of a run by name.
      behaviours: what a fake run does, by name; see fake_run.py.
      alive: whether a device can still be used.
    """

    study: Study
    losses: dict[str, float] = dataclasses.field(default_factory=dict)
    behaviours: dict[str, str] = dataclasses.field(default_factory=dict)
    alive: Callable[[Device], bool] = lambda device: True
    devices: tuple[Device, ...] = (Device("this machine"),)
    jobs: int = 1

    def words(self, run: StudyRun) -> list[str]:
        loss = str(self.losses.get(run.name, 3.0))
        steps = str(run.config.steps)
        words = [sys.executable, FAKE_RUN, run.config.run_dir, steps, loss]
        return [*words, self.behaviours.get(run.name, "")]

    def queue(self) -> tuple[Queue, Recorder]:
        view = Recorder()
        return Queue(
            self.study, self.devices, self.jobs, view, lambda queue: None, self.alive, self.words
        ), view

    def work(self) -> tuple[Queue, Recorder]:
        """Trains all runs."""
        queue, view = self.queue()
        with queue:
            queue.work()
        return queue, view


def starts(run: StudyRun) -> int:
    """Returns how often a fake run was started."""
    path = Path(run.config.run_dir) / "starts"
    return len(path.read_text()) if path.exists() else 0
