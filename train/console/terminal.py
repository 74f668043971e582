"""Output on the terminal: consoles that print text verbatim, and one-line messages on stderr."""

import contextlib
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from mora_jax.errors import spelled_out

# Characters of a line where there is no terminal: a file or pipe gets every cell of a table whole.
_UNLIMITED = 10_000


def console(stderr: bool = False, width: int | None = None, highlight: bool = True) -> Console:
    """Returns a rich console that ignores markup, since names and contents of files may look like it.

    Args:
      stderr: whether to write to standard error instead of standard output.
      width: in characters; None for the terminal's, or for no limit where there is none.
      highlight: whether numbers and the like are coloured.
    """
    made = Console(stderr=stderr, width=width, highlight=highlight, markup=False, emoji=False)
    if width is None and not made.is_terminal:
        made.width = _UNLIMITED
    return made


def log(sentence: str, every_process: bool = False) -> None:
    """Prints a sentence as one line on stderr.

    Args:
      sentence: the message; control characters are escaped.
      every_process: whether all processes print it, or process 0 alone. If true, JAX is not started.
    """
    if every_process or jax.process_index() == 0:
        print(f"mora: {spelled_out(sentence)}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def one_line_warnings() -> Iterator[None]:
    """Prints what libraries warn of through Python's `warnings` as this program's own warnings."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        warn([str(message)], every_process=True)

    before, warnings.showwarning = warnings.showwarning, show
    try:
        yield
    finally:
        warnings.showwarning = before


def warn(sentences: Iterable[str], every_process: bool = False) -> None:
    """Logs each sentence as a warning."""
    for sentence in sentences:
        log(f"warning: {sentence}", every_process)


def print_summary(summary: dict[str, Any], title: str) -> None:
    """Prints a short table of figures. Control characters in it are escaped."""
    table = Table("", "", title=spelled_out(title), show_header=False)
    for name, value in summary.items():
        table.add_row(spelled_out(name.replace("_", " ")), spelled_out(_readable(value)))
    console().print(table)


def _readable(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
