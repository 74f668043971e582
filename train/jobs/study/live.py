"""Shows how the runs of a study are doing: a table on a terminal, and lines anywhere else."""

import time
from collections.abc import Sequence
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from train.config.study import StudyRun
from train.console import terminal
from train.console.terminal import log
from train.jobs.study.outcomes import Newest, newest
from train.jobs.study.queue import Queue

# Seconds between two lines on the runs where there is no terminal.
QUIET = 60.0
# Lines of a terminal that the table leaves free.
_MARGIN = 5
_HEADS = ("run", "state", "step", "tokens/s", "loss", "left")
_ORDER = ("training", "in use", "finished", "diverged", "failed", "stopped", "paused", "waiting")


class LiveView:
    """A context manager; see `train.jobs.study.queue.View`."""

    def __init__(self, console: Console | None = None, quiet: float = QUIET) -> None:
        self._console = console or terminal.console(stderr=True, highlight=False)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._drawn = self._console.is_terminal
        self._quiet, self._printed_at = quiet, time.monotonic()
        self._waited: set[str] = set()

    def show(self, queue: Queue) -> None:
        """Draws the table, or prints a line if the last one is old."""
        for name, user in queue.in_use.items():
            if name not in self._waited:
                self._waited.add(name)
                self.say(f"{name}: in use by {user}; waiting for it")
        if self._drawn:
            self._live.update(table(queue, self._console.height - _MARGIN), refresh=True)
        elif time.monotonic() - self._printed_at >= self._quiet:
            self._printed_at = time.monotonic()
            for line in lines(queue):
                self.say(line)

    def say(self, sentence: str) -> None:
        """Prints an event as one line, above the table."""
        if self._drawn:
            self._console.print(f"mora: {sentence}", soft_wrap=True)
        else:
            log(sentence, every_process=True)

    def __enter__(self) -> Self:
        if self._drawn:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._drawn:
            self._live.stop()


def table(queue: Queue, height: int) -> Table:
    """Returns the table of all runs, those that train first. What exceeds the height is counted."""
    made = Table(*_HEADS, title=f"{queue.study.run_dir}: {counts(queue)}", title_justify="left")
    for column in made.columns[2:]:
        column.justify = "right"
    shown = sorted(_shown(queue), key=lambda run: _ORDER.index(state(queue, run)))
    room = len(shown) if len(shown) <= height else max(height - 1, 1)
    for run in shown[:room]:
        made.add_row(*cells(queue, run))
    if len(shown) > room:
        made.add_row(f"and {len(shown) - room} more")
    return made


def lines(queue: Queue) -> list[str]:
    """Returns one line on the whole study, and one for each run that trains."""
    found = [counts(queue)]
    for name in queue.training:
        run = queue.training[name].run
        parts = dict(zip(_HEADS, cells(queue, run), strict=True))
        facts = [parts["state"], f"step {parts['step']}"]
        facts += [f"{parts['tokens/s']} tokens/s"] if parts["tokens/s"] else []
        facts += [f"loss {parts['loss']}"] if parts["loss"] else []
        facts += [f"{parts['left']} left"] if parts["left"] else []
        found.append(f"{name}: {' · '.join(facts)}")
    return found


def counts(queue: Queue) -> str:
    """Returns how many runs are in each state."""
    states = [state(queue, run) for run in _shown(queue)]
    return ", ".join(f"{states.count(word)} {word}" for word in _ORDER if word in states)


def state(queue: Queue, run: StudyRun) -> str:
    """Returns the state of a run in a word or two."""
    if run.name in queue.training:
        return "training"
    if run.name in queue.in_use:
        return "in use"
    outcome, verdict = queue.found[run.name], queue.verdicts[run.name]
    if outcome.ended:
        return outcome.state
    if verdict.kind == "stopped":
        return "stopped"
    return "paused" if verdict.kind == "wait" else "waiting"


def cells(queue: Queue, run: StudyRun) -> Sequence[str]:
    """Returns the row of a run in the table."""
    outcome, now = queue.found[run.name], Newest()
    words = state(queue, run)
    step, loss, left = outcome.step, "", ""
    if words == "training":
        now = newest(run)
        step = now.done or step
        words = queue.training[run.name].device.name
        loss = "" if now.loss is None else f"{now.loss:.3f}"
        if now.tokens_per_second:
            tokens = (run.config.steps - step) * run.config.tokens_per_step()
            left = str(timedelta(seconds=int(tokens / now.tokens_per_second)))
    elif outcome.perplexity is not None:
        words = f"perplexity {outcome.perplexity:.4g}"
        loss = f"{outcome.loss:.3f}"
    rate = now.tokens_per_second or outcome.tokens_per_second
    return (
        run.name,
        words,
        f"{step:,}/{run.config.steps:,}",
        f"{rate:,.0f}" if rate else "",
        loss,
        left,
    )


def _shown(queue: Queue) -> list[StudyRun]:
    return [run for run in queue.study.runs if queue.verdicts[run.name].kind != "unused"]
