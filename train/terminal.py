"""What is said on the terminal: text as it is, sentences of the program on stderr."""

import sys
from collections.abc import Iterable
from typing import Any

import jax
from rich.console import Console


def console(**options: Any) -> Console:
    """A console of rich that takes no text for markup: names of files and what files say may look like it."""
    return Console(markup=False, emoji=False, **options)


def warn(sentences: Iterable[str]) -> None:
    """Tells what is not as it should be, a line each."""
    for sentence in sentences:
        tell(f"warning: {sentence}")


def tell(sentence: str) -> None:
    """Says something on stderr, once for all processes."""
    if jax.process_index() == 0:
        print(f"mora: {sentence}", file=sys.stderr, flush=True)
