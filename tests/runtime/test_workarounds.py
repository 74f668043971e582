"""Workarounds that no test of what uses them would notice to be missing."""

import sys
import threading

import pytest
from orbax.checkpoint._src.futures import future
from orbax.checkpoint._src.futures.synchronization import HandlerAwaitableSignal

from train.runtime import workarounds


def test_the_threads_of_a_failed_save_end(caplog: pytest.LogCaptureFixture):
    """Else the program would wait five minutes at its end."""
    never = [HandlerAwaitableSignal.STEP_DIRECTORY_CREATION]
    done: list[str] = []
    threads = [
        future._SignalingThread(
            target=lambda: done.append("written"),
            send_signals=[],
            receive_signals=never,
            operation_id=f"of this test {n}",
        )
        for n in range(3)
    ]
    for thread in threads:
        thread.start()
    assert all(thread.is_alive() for thread in threads)
    workarounds.end_failed_save()
    assert not any(thread.is_alive() for thread in threads)
    assert not set(threads) & set(threading.enumerate())
    assert done == []
    assert caplog.text == ""


class Fails:
    """Raises an error that Python can only print."""

    def __init__(self, words: str) -> None:
        self.words = words

    def __del__(self) -> None:
        raise RuntimeError(self.words)


def test_only_errors_of_closed_loops_are_dropped(monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: seen.append(str(found.exc_value)))
    workarounds.ignore_closed_loops()
    workarounds.ignore_closed_loops()
    for words in ("Event loop is closed", "another"):
        Fails(words)
    assert seen == ["another"]
