"""Output whose reader has gone away."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest
from rich.console import Console

from train.streams import unheard

FULL = Path("/dev/full")
MUCH = "x" * (1 << 18)  # more than what a pipe and a stream hold back


@contextlib.contextmanager
def replaced(monkeypatch: pytest.MonkeyPatch, stream: TextIO) -> Iterator[None]:
    """A stream in the place of both; closing it fails where something in it can go nowhere."""
    with monkeypatch.context() as patch, stream:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        yield


@pytest.mark.parametrize("told", ["", "a little", MUCH], ids=["nothing", "a little", "much"])
@pytest.mark.parametrize("drawn", [False, True])
def test_what_nobody_reads_is_dropped(monkeypatch, told, drawn):
    reading, writing = os.pipe()
    with replaced(monkeypatch, os.fdopen(writing, "w")):
        with unheard():
            print("heard", flush=True)
            assert os.read(reading, 100) == b"heard\n"
            os.close(reading)
            for stream in (sys.stdout, sys.stderr, sys.stdout):
                print(told, file=stream)
                if drawn:
                    Console(file=stream).print(told[:9])
        sys.stdout.flush()  # as the interpreter does in the end


def test_what_is_read_arrives(capsys):
    with unheard():
        print("out")
        print("err", file=sys.stderr)
    assert capsys.readouterr() == ("out\n", "err\n")


@pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")
def test_another_failure_is_still_one(monkeypatch):
    with (
        contextlib.suppress(OSError),  # again, as it is closed
        replaced(monkeypatch, FULL.open("w")),
        pytest.raises(OSError, match="No space left"),
        unheard(),
    ):
        print(MUCH)
