"""What is said on the terminal: text as it is, sentences of the program on stderr."""

import sys
from collections.abc import Iterable

import jax
from rich.console import Console

from mora_jax.errors import spelled_out


def console(stderr: bool = False, width: int | None = None, highlight: bool = True) -> Console:
    """A console of rich that takes no text for markup: names of files and what files say may look like it.

    Args:
      stderr: whether it is standard error; else it is standard output.
      width: in characters; None for the terminal's.
      highlight: whether numbers and the like are coloured.
    """
    return Console(stderr=stderr, width=width, highlight=highlight, markup=False, emoji=False)


def warn(sentences: Iterable[str]) -> None:
    """Tells what is not as it should be, a line each."""
    for sentence in sentences:
        tell(f"warning: {sentence}")


def tell(sentence: str) -> None:
    """Says something on stderr, in one line, once for all processes."""
    if jax.process_index() == 0:
        print(f"mora: {spelled_out(sentence)}", file=sys.stderr, flush=True)
