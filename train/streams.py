"""Standard output and error of a program whose reader may go away before it ends."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """What is told to a pipe that nobody reads any more is dropped: work outlives its log."""
    out, err = (cast(TextIO, Unheard(stream)) for stream in (sys.stdout, sys.stderr))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            yield
        finally:
            out.flush()  # else the interpreter does at its end, and fails there
            err.flush()


class Unheard:
    """A text stream that swallows what a closed pipe refuses, and all that follows."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """As the stream's; the number of characters that were taken."""
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._turn_away()
        return len(text)

    def flush(self) -> None:
        """As the stream's."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._turn_away()

    def _turn_away(self) -> None:
        """Has what is buffered, and whatever comes, go nowhere."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
