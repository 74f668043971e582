"""Output whose reader has gone away, or reads nothing, and output that no disk has room for."""

import contextlib
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest
from rich.console import Console

from train.console.streams import PATIENCE, lossy_output

FULL = Path("/dev/full")
MUCH = "x" * (1 << 18)  # more than what a pipe and a stream hold back

needs_full = pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")


@contextlib.contextmanager
def replaced(monkeypatch: pytest.MonkeyPatch, stream: TextIO | None) -> Iterator[None]:
    """A stream in the place of both; closing it fails where something in it can go nowhere."""
    with monkeypatch.context() as patch, stream or contextlib.nullcontext():
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        yield


def show(text: str, drawn: bool) -> None:
    for stream in (sys.stdout, sys.stderr, sys.stdout):
        print(text, file=stream)
        if drawn:
            Console(file=stream).print(text[:9])


@pytest.mark.parametrize("result", [False, True])
@pytest.mark.parametrize("text", ["", "a little", MUCH], ids=["nothing", "a little", "much"])
@pytest.mark.parametrize("drawn", [False, True])
def test_output_is_dropped_once_its_reader_left(monkeypatch, text, drawn, result):
    reading, writing = os.pipe()
    with replaced(monkeypatch, os.fdopen(writing, "w")):
        with lossy_output(result):
            print("read", flush=True)
            assert os.read(reading, 100) == b"read\n"
            os.close(reading)
            show(text, drawn)
            sys.stdout.flush()
        sys.stdout.flush()  # as the interpreter does in the end


@pytest.mark.parametrize("text", ["", "a little", MUCH], ids=["nothing", "a little", "much"])
@pytest.mark.parametrize("drawn", [False, True])
@needs_full
def test_output_is_dropped_on_a_full_disk(monkeypatch, text, drawn):
    with replaced(monkeypatch, FULL.open("w")), lossy_output():
        show(text, drawn)
        sys.stdout.flush()


def test_output_is_dropped_once_the_terminal_is_gone(monkeypatch):
    screen, terminal = os.openpty()
    os.close(screen)
    with replaced(monkeypatch, os.fdopen(terminal, "w")), lossy_output():
        show("a little", drawn=True)
        sys.stdout.flush()


def test_closed_streams(monkeypatch):
    with replaced(monkeypatch, None), lossy_output():
        show("a little", drawn=True)
        assert not sys.stderr.isatty()


def test_a_stalled_reader_is_waited_for_once_and_not_long(monkeypatch):
    reading, writing = os.pipe()
    with replaced(monkeypatch, os.fdopen(writing, "w")):
        began = time.monotonic()
        with lossy_output():
            for _ in range(3):
                show(MUCH, drawn=True)
        assert PATIENCE <= time.monotonic() - began < 3 * PATIENCE  # two streams
    with os.fdopen(reading) as file:
        assert len(file.read()) >= len(MUCH)


def test_a_reader_that_continues_gets_later_output(monkeypatch):
    reading, writing = os.pipe()
    with replaced(monkeypatch, os.fdopen(writing, "w")):
        with lossy_output():
            print(MUCH, flush=True)
            print("dropped", flush=True)
            left = len(MUCH) + 1
            while left:
                left -= len(os.read(reading, left))
            while not select.select([reading], [], [], 0.1)[0]:
                print("read", flush=True)
        assert os.read(reading, 100).startswith(b"read\n")
    os.close(reading)


def test_a_result_waits_for_a_slow_reader(monkeypatch):
    reading, writing = os.pipe()
    received = []

    def read_late() -> None:
        time.sleep(1.5 * PATIENCE)
        with os.fdopen(reading) as file:
            received.append(file.read())

    thread = threading.Thread(target=read_late)
    thread.start()
    with replaced(monkeypatch, os.fdopen(writing, "w")), lossy_output(result=True):
        print(MUCH)
    thread.join()
    assert received == [MUCH + "\n"]


@pytest.mark.parametrize("result", [False, True])
def test_output_that_is_read_arrives(capsys, result):
    with lossy_output(result):
        print("out")
        print("err", end="", file=sys.stderr)
    assert capsys.readouterr() == ("out\n", "err")


def test_held_output_is_written_at_the_end(capsys):
    """So nobody reads it while Ctrl-C still stops the command."""
    with lossy_output(held=True):
        print("out", flush=True)
        Console(file=sys.stdout).print("drawn")
        sys.stdout.flush()
        print("err", file=sys.stderr)
        assert capsys.readouterr().out == ""
    assert capsys.readouterr().out == "out\ndrawn\n"


@needs_full
def test_a_result_that_cannot_be_written_is_an_error(monkeypatch):
    with replaced(monkeypatch, FULL.open("w")), lossy_output(result=True):
        print(MUCH)
        with pytest.raises(OSError, match="No space left"):
            sys.stdout.flush()


CLOSED = """
import os
from train.console.streams import lossy_output
with lossy_output():
    with open("file", "w") as file:
        assert file.fileno() > 2
    print("nothing")
    os.system("echo to nobody")
"""


def test_no_file_takes_the_place_of_a_closed_stream(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    words = 'exec "$0" -c "$1" <&- >&- 2>&-'
    done = subprocess.run(["sh", "-c", words, sys.executable, CLOSED], cwd=tmp_path, env=environment)
    assert done.returncode == 0
    assert (tmp_path / "file").read_text() == ""


def test_errors_are_held_back_and_shown_or_dropped():
    code = """
import os
from train.console.streams import held_errors
with held_errors():
    os.write(2, b"shown ")
with held_errors() as drop:
    os.write(2, b"dropped ")
    drop()
    os.write(2, b"last words ")
    os._exit(3)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert (done.returncode, done.stderr) == (3, "shown last words ")
