"""Standard output and error of a program that outlives them: their reader may go away, their disk be full."""

import contextlib
import os
import select
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO, cast

# Seconds that a stream is waited for which takes nothing, such as a pipe that nobody reads.
PATIENCE = 1.0
# Characters that are kept for a stream before it is waited for.
_HELD = 1 << 16


@contextlib.contextmanager
def unheard(result: bool = False) -> Iterator[None]:
    """What nobody reads, or takes within `PATIENCE`, is dropped: work outlives its log.

    Args:
      result: whether what is told on standard output is no log but what the work is for. Then it is waited
        for without end, and flushing it raises what it was refused for; unless its reader has gone away.
    """
    _fill_standard_files()
    with Path(os.devnull).open("w") as nowhere:
        out = Unheard(sys.stdout or nowhere, None if result else PATIENCE)
        err = Unheard(sys.stderr or nowhere, PATIENCE)
        with contextlib.redirect_stdout(cast(TextIO, out)), contextlib.redirect_stderr(cast(TextIO, err)):
            try:
                yield
            finally:
                for stream in (out, err):
                    stream.hand_over(PATIENCE)


class Unheard:
    """A text stream that fails for nothing and is held up by nobody.

    A thread writes, past the stream's own buffer: Python would wait for that in the end. There is one only
    while there is something to write.
    """

    def __init__(self, stream: TextIO, patience: float | None) -> None:
        """`patience` is how many seconds it is waited for; with None without end, and errors are raised."""
        with contextlib.suppress(OSError):
            stream.flush()
        self._stream, self._patience = stream, patience
        self._changed = threading.Condition()  # guards all below
        self._held = self._line = ""
        self._writing = self._stalled = False
        self._error: OSError | None = None

    def write(self, text: str) -> int:
        """Takes all of it, and writes it at the end of a line; the number of characters."""
        with self._changed:
            self._line += text
            if "\n" in text:
                self._pass_on()
            waiting = self._patience is None or len(self._held) > _HELD
        if waiting:
            self.hand_over(self._patience)
        return len(text)

    def flush(self) -> None:
        """Waits until all is written, or dropped."""
        self.hand_over(self._patience)
        error, self._error = self._error, None
        if error and self._patience is None and not isinstance(error, BrokenPipeError):
            raise error

    def hand_over(self, patience: float | None) -> None:
        """Has all written, and waits for that; what is not within `patience` is left behind."""
        with self._changed:
            self._pass_on()
            if not self._stalled:
                self._stalled = not self._changed.wait_for(lambda: not self._writing, patience)

    def _pass_on(self) -> None:
        line, self._line = self._line, ""
        if self._stalled or not line:
            return
        self._held += line
        if not self._writing:
            self._writing = True
            try:
                threading.Thread(target=self._write_held, daemon=True).start()
            except RuntimeError:  # there are too many, or Python is ending
                self._write_held()

    def _write_held(self) -> None:
        while text := self._take():
            try:
                self._put(text)
            except OSError as error:
                self._error = error
            except ValueError:  # somebody has closed it, or it has no such letters
                pass

    def _take(self) -> str:
        with self._changed:
            text, self._held = self._held, ""
            if not text:
                self._writing = self._stalled = False
                self._changed.notify_all()
            return text

    def _put(self, text: str) -> None:
        try:
            file = self._stream.fileno()
        except (OSError, AttributeError):  # it is none of the system's
            self._stream.write(text)
            return
        data = text.encode(self._stream.encoding, "backslashreplace")
        while data:
            try:
                data = data[os.write(file, data) :]
            except BlockingIOError:  # another program has set it so
                select.select([], [file], [])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _fill_standard_files() -> None:
    """Opens those that are closed: the next file opened would take their place, and what is told there."""
    while (file := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(file, True)
    os.close(file)
