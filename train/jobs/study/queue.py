"""Trains the runs of a study, each in a process of its own, on the devices of this machine.

The queue remembers nothing that matters: after any end, the next one reads the runs' folders and continues.
"""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from train.config.study import Study, StudyRun
from train.console import exits
from train.jobs.study import outcomes as folders
from train.jobs.study.devices import Device, works
from train.jobs.study.outcomes import Outcome
from train.jobs.study.verdicts import Verdict, verdicts
from train.storage import lock

# Seconds between two looks at the processes.
POLL = 0.5
# A run that is killed is started again, unless so many starts in a row got no further.
FRUITLESS = 3
_RETRIED = (exits.PREEMPTED, exits.LOST, *(exits.SIGNALLED + n for n in (signal.SIGTERM, signal.SIGINT)))
_LONGEST_NOTE = 300


class View(Protocol):
    """Shows how the runs of a study are doing."""

    def show(self, queue: "Queue") -> None:
        """Shows the runs; called several times a second."""

    def say(self, sentence: str) -> None:
        """Prints an event as one line."""


@dataclasses.dataclass
class Training:
    """A run in its process.

    Attributes:
      run: the run.
      process: its process.
      device: what it trains on.
      log_start: size of its log at the start.
      stopping: whether it was asked to stop.
    """

    run: StudyRun
    process: subprocess.Popen[bytes]
    device: Device
    log_start: int
    stopping: bool = False


@dataclasses.dataclass
class Tries:
    """Starts of a run that got no further than an earlier one."""

    step: int = -1
    fruitless: int = 0


def command(run: StudyRun) -> list[str]:
    """Returns the words of the command line that trains a run."""
    return ["pretrain", run.base, *run.words]


def program(run: StudyRun) -> list[str]:
    """Returns the program that trains a run, and that ends when this one is gone."""
    return [sys.executable, "-m", "train.jobs.study.child", str(os.getpid()), *command(run)]


class Queue:
    """The runs of a study and the processes that train them. A context manager, which handles signals.

    Attributes:
      study: the study.
      found: outcome of every run by name, as of the last end of a run.
      verdicts: what happens to each run next.
      training: the runs that are being trained, by name.
      in_use: runs that another program trains, and that program.
      lost: devices that can no longer be used.
    """

    def __init__(
        self,
        study: Study,
        devices: Sequence[Device],
        jobs: int,
        view: View,
        ended: Callable[["Queue"], None],
        alive: Callable[[Device], bool] = works,
        words: Callable[[StudyRun], list[str]] = program,
    ) -> None:
        """Args:
        study: the study.
        devices: what runs are trained on.
        jobs: runs at a time on each device.
        view: shows the runs.
        ended: called whenever a run has ended.
        alive: whether a device on which a run failed can still be used.
        words: the program that trains a run.
        """
        self.study, self._devices, self._jobs, self._view = study, list(devices), jobs, view
        self._ended, self._alive, self._words = ended, alive, words
        self.training: dict[str, Training] = {}
        self.in_use: dict[str, str] = {}
        self.lost: list[Device] = []
        self._tries = {run.name: Tries() for run in study.runs}
        self._signals = 0
        for run in study.runs:  # what failed is tried again
            folders.failure_file(study, run).unlink(missing_ok=True)
        self.found = folders.outcomes(study)
        self.verdicts = verdicts(study, self.found)

    def work(self) -> None:
        """Trains all runs.

        Raises:
          Preempted: if a signal stopped them.
        """
        while not self._signals:
            self._start_runs()
            self._view.show(self)
            if not self.training and not self.in_use:
                return
            time.sleep(POLL)
            for training in list(self.training.values()):
                self._look_at(training)
        self._stop_all()

    def unfinished(self) -> list[StudyRun]:
        """Returns the runs that should have been trained further and were not."""
        return [run for run in self.study.runs if self.verdicts[run.name].kind in ("train", "wait")]

    def _start_runs(self) -> None:
        self.in_use.clear()
        for run in self._startable():
            device = self._free()
            if device is None:
                return
            if user := lock.holder(run.config.run_dir):  # such as a run of a killed study, which saves
                self.in_use[run.name] = user
                continue
            self._start(run, device)

    def _startable(self) -> Iterator[StudyRun]:
        for run in self.study.runs:
            if self.verdicts[run.name].kind == "train" and run.name not in self.training:
                yield run

    def _free(self) -> Device | None:
        """Returns the device with the fewest runs, None if all are taken."""
        taken = [training.device.name for training in self.training.values()]
        free = [d for d in self._devices if d not in self.lost and taken.count(d.name) < self._jobs]
        return min(free, key=lambda d: taken.count(d.name), default=None)

    def _start(self, run: StudyRun, device: Device) -> None:
        path = folders.log_file(self.study, run)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as stream:
            start = stream.tell()
            process = subprocess.Popen(
                self._words(run),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env={**os.environ, **device.environment},
                start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on once
            )
        self.training[run.name] = Training(run, process, device, start)
        self._view.say(f"{run.name}: started on {device.name}")

    def _look_at(self, training: Training) -> None:
        run = training.run
        status = training.process.poll()
        if status is not None:
            del self.training[run.name]
            self._end(training, status)
            return
        verdict = self.verdicts[run.name]
        if verdict.step < run.config.steps and not training.stopping:
            # An update after the step is logged after the evaluation there.
            if folders.newest(run).done <= verdict.step:
                return
            self._read(run)
            verdict = self.verdicts[run.name]
            if verdict.kind != "train" or verdict.step <= self.found[run.name].step:
                training.stopping = True
                training.process.send_signal(signal.SIGTERM)

    def _end(self, training: Training, status: int) -> None:
        """Notes what the end of a process means for its run."""
        run = training.run
        self._read(run)
        state = self.found[run.name].state
        if training.stopping and status == exits.PREEMPTED:
            self._view.say(f"{run.name}: {self._described(self.verdicts[run.name])}")
        elif state not in ("finished", "diverged") and not self._retried(training, status):
            self._fail(training, status)
        if (now := self.found[run.name]).ended:
            self._view.say(f"{run.name}: {result_of(now)}")
        self._ended(self)

    def _retried(self, training: Training, status: int) -> bool:
        """Returns whether a run that ended early is started again."""
        run, tries = training.run, self._tries[training.run.name]
        if status not in (0, exits.PREEMPTED, exits.MEMORY) and not self._usable(training.device):
            return True
        if status >= 0 and status not in _RETRIED:
            return False
        step = self.found[run.name].step
        tries.fruitless = 0 if step > tries.step else tries.fruitless + 1
        tries.step = max(step, tries.step)
        if tries.fruitless >= FRUITLESS:
            return False
        self._view.say(f"{run.name}: ended with status {status} after {step:,} updates; it is started again")
        return True

    def _usable(self, device: Device) -> bool:
        if device in self.lost:
            return False
        if not device.environment or self._alive(device):
            return True
        self.lost.append(device)
        left = len(self._devices) - len(self.lost)
        runs = "its runs go to the others" if left else "no other is left"
        self._view.say(f"warning: {device.name} can no longer be used; {runs}")
        return False

    def _fail(self, training: Training, status: int) -> None:
        path = folders.log_file(self.study, training.run)
        with path.open("rb") as file:
            file.seek(training.log_start)
            text = file.read().decode(errors="replace")
        note = reason_in(text) or "it printed nothing"
        folders.keep_failure(self.study, training.run, status, f"status {status}: {note}")
        self._read(training.run)

    def _read(self, run: StudyRun) -> None:
        self.found[run.name] = folders.outcome(self.study, run)
        self.verdicts = verdicts(self.study, self.found)

    def _described(self, verdict: Verdict) -> str:
        return {
            "train": "paused; it continues later",
            "wait": f"paused after {verdict.step:,} updates, until the others of its row are there",
            "stopped": f"stopped by halving after {verdict.step:,} updates",
        }.get(verdict.kind, verdict.kind)

    def _stop_all(self) -> None:
        """Asks every run to stop with a checkpoint and waits for them. Another signal ends them at once."""
        self._view.say(f"stopping {len(self.training)} runs with checkpoints; once more to stop at once")
        sent = 0
        while self.training:
            if sent < self._signals:
                sent = self._signals
                for training in self.training.values():
                    training.process.send_signal(signal.SIGTERM)
            for name, training in list(self.training.items()):
                if training.process.poll() is not None:
                    del self.training[name]
                    self._read(training.run)
            self._view.show(self)
            time.sleep(0.1)
        self._ended(self)
        raise exits.Preempted(f"{self.study.run_dir}: stopped; the same command continues")

    def _on_signal(self, number: int, frame: Any) -> None:
        if number == signal.SIGHUP and self._signals:  # a closing terminal sends several
            return
        self._signals += 1

    def __enter__(self) -> Self:
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        handled = [n for n in numbers if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        main = threading.current_thread() is threading.main_thread()
        self._before = {n: signal.signal(n, self._on_signal) for n in handled} if main else {}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for training in self.training.values():  # after a bug
            training.process.send_signal(signal.SIGTERM)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def reason_in(text: str) -> str:
    """Returns the line of a run's output that says why it ended; empty if there is none."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [
        line.removeprefix("mora: ")
        for line in lines
        if line.startswith("mora: ") and not line.startswith("mora: warning")
    ]
    return "".join((errors or lines)[-1:])[:_LONGEST_NOTE]


def result_of(outcome: Outcome) -> str:
    """Returns the end of a run in words."""
    if outcome.perplexity is not None:
        return f"finished, validation perplexity {outcome.perplexity:.4g}"
    if outcome.state == "diverged":
        return f"diverged after {outcome.step:,} updates"
    return f"failed after {outcome.step:,} updates: {outcome.note}"
