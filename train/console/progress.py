"""Progress of long work on stderr: a bar on a terminal, and a line from time to time anywhere else."""

import contextlib
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from train.console import terminal

# Seconds between two lines where there is no terminal.
QUIET = 10.0


@contextlib.contextmanager
def progress(
    description: str, total: float | None, unit: str, console: Console | None = None
) -> Iterator[Callable[[float], None]]:
    """Shows the progress of long work. May be nested.

    Args:
      description: the work, such as "evaluating".
      total: units of all the work; None if that is not known.
      unit: what is counted, in the plural.
      console: where to; stderr by default.

    Yields:
      advance(n): counts n more units as done.
    """
    with Bar(description, total, unit, console) as bar:
        yield lambda n: bar.advance(n)


class Bar:
    """One piece of work: what is done, the time left, and its speed or other facts. A context manager."""

    def __init__(
        self,
        description: str,
        total: float | None,
        unit: str,
        console: Console | None = None,
        start: float = 0,
    ) -> None:
        """Takes the arguments of `progress`, and `start`: units done earlier, which count for no speed."""
        self._console = console or terminal.console(stderr=True)
        self._drawn = self._console.is_terminal
        self._unit = unit
        self._started = self._printed_at = time.monotonic()
        self._unprinted = False
        # Even if nothing is drawn, rich counts speed and time left.
        columns = (
            BarColumn(bar_width=20),
            TextColumn("{task.fields[line]}", markup=False, table_column=Column(no_wrap=True)),
        )
        self._rich = Progress(*columns, console=self._console, disable=not self._drawn)
        self._id = self._rich.add_task(description, total=total, completed=start, line=description)  # pyright: ignore[reportArgumentType]

    def advance(self, n: float, facts: str = "", left: float | None = None) -> None:
        """Counts n more units as done.

        Args:
          n: units since the last call.
          facts: shown in place of the speed.
          left: seconds left; None to estimate them from the speed of the last half minute.
        """
        self._rich.advance(self._id, n)
        self._rich.update(self._id, line=self._line(facts, left))
        self._unprinted = not self._drawn
        if self._unprinted and time.monotonic() - self._printed_at >= QUIET:
            self._print()

    def _line(self, facts: str, left: float | None) -> str:
        task = self._rich.tasks[0]
        total = "" if task.total is None else f"/{task.total:,.0f}"
        left = None if task.finished else task.time_remaining if left is None else left
        parts = (
            f"{task.description} {task.completed:,.0f}{total} {self._unit}",
            "" if left is None else f"{timedelta(seconds=int(left))} left",
            facts or (f"{task.speed:,.0f} {self._unit}/s" if task.speed else ""),
        )
        return " · ".join(part for part in parts if part)

    def _print(self) -> None:
        self._printed_at, self._unprinted = time.monotonic(), False
        self._console.print(self._rich.tasks[0].fields["line"], highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        self._rich.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._rich.stop()
        # Work that ends before its first line is due prints nothing.
        if self._unprinted and time.monotonic() - self._started >= QUIET:
            self._print()
