"""Standard output and error that a program outlives: their reader may go away, or their disk fill up."""

import contextlib
import os
import select
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO, cast

# Seconds to wait for a stream that accepts nothing, such as a pipe that nobody reads.
PATIENCE = 1.0
_STDERR = 2
# Characters to buffer for a stream before waiting for it.
_BUFFERED = 1 << 16


@contextlib.contextmanager
def lossy_output(result: bool = False, held: bool = False) -> Iterator[None]:
    """Drops output that its reader does not accept within `PATIENCE`, instead of failing or waiting.

    Args:
      result: whether standard output is the result of the command and not a log. If so, writing waits for
        the reader without limit, and flushing raises the error of a failed write, unless the reader left.
      held: whether standard output is a few lines that are written when the block ends.
    """
    _open_standard_files()
    with Path(os.devnull).open("w") as nowhere:
        out = LossyStream(sys.stdout or nowhere, None if result else PATIENCE, held)
        err = LossyStream(sys.stderr or nowhere, PATIENCE)
        with contextlib.redirect_stdout(cast(TextIO, out)), contextlib.redirect_stderr(cast(TextIO, err)):
            try:
                yield
            finally:
                for stream in (out, err):
                    stream.drain(PATIENCE)


@contextlib.contextmanager
def held_errors() -> Iterator[Callable[[], None]]:
    """Holds back what is written to standard error, by native code too, until the block ends.

    Yields:
      A function that drops what was written, for a program that ends inside the block.
    """
    kept = os.dup(_STDERR)

    def drop() -> None:
        os.dup2(kept, _STDERR)

    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), _STDERR)
        try:
            yield drop
        finally:
            drop()
            os.close(kept)
            held.seek(0)
            sys.stderr.write(held.read().decode(errors="replace"))


class LossyStream:
    """A text stream that never raises and never blocks for long.

    A thread writes to the file itself, past the stream's buffer, which Python would wait for at exit. The
    thread exists only while there is something to write.
    """

    def __init__(self, stream: TextIO, patience: float | None, held: bool = False) -> None:
        """Wraps a stream. With a `patience` (seconds) of None, it waits without limit and raises errors.

        One that is `held` writes nothing before it is drained.
        """
        with contextlib.suppress(OSError):
            stream.flush()
        self._stream, self._patience, self._held = stream, patience, held
        self._changed = threading.Condition()  # guards all below
        self._buffer = self._line = ""
        self._writing = self._stalled = False
        self._error: OSError | None = None

    def write(self, text: str) -> int:
        """Buffers the text, and writes it when a line is complete. Returns the number of characters."""
        with self._changed:
            self._line += text
            if "\n" in text and not self._held:
                self._start_writing()
            full = self._patience is None or len(self._buffer) > _BUFFERED
        if full:
            self.drain(self._patience)
        return len(text)

    def flush(self) -> None:
        """Waits until all is written or dropped. Raises the OSError of a result that was not written."""
        if not self._held:
            self.drain(self._patience)
        error, self._error = self._error, None
        if error and self._patience is None and not isinstance(error, BrokenPipeError):
            raise error

    def drain(self, patience: float | None) -> None:
        """Writes all that is buffered and waits at most `patience` seconds for it."""
        with self._changed:
            self._start_writing()
            if not self._stalled:
                self._stalled = not self._changed.wait_for(lambda: not self._writing, patience)

    def _start_writing(self) -> None:
        line, self._line = self._line, ""
        if self._stalled or not line:
            return
        self._buffer += line
        if not self._writing:
            self._writing = True
            try:
                threading.Thread(target=self._write_buffer, daemon=True).start()
            except RuntimeError:  # there are too many threads, or Python is exiting
                self._write_buffer()

    def _write_buffer(self) -> None:
        while text := self._next_text():
            try:
                self._put(text)
            except OSError as error:
                self._error = error
            except ValueError:  # the stream is closed, or its encoding lacks a character
                pass

    def _next_text(self) -> str:
        with self._changed:
            text, self._buffer = self._buffer, ""
            if not text:
                self._writing = self._stalled = False
                self._changed.notify_all()
            return text

    def _put(self, text: str) -> None:
        try:
            file = self._stream.fileno()
        except (OSError, AttributeError):  # not a file of the operating system
            self._stream.write(text)
            return
        data = text.encode(self._stream.encoding, "backslashreplace")
        while data:
            try:
                data = data[os.write(file, data) :]
            except BlockingIOError:  # another program made the file non-blocking
                select.select([], [file], [])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _open_standard_files() -> None:
    """Opens standard files that are closed, or the next file opened would take their place."""
    while (file := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(file, True)
    os.close(file)
