"""Several processes, one of which is killed, and what counts as a good end of all others."""

import signal
import subprocess

import pytest
import soak_processes
from soak_processes import KINDS, Options, Strike, draw, struck


@pytest.mark.parametrize(
    ("kind", "own", "other", "documented", "hung"),
    [
        ("update", "exec sleep 60", "exit 76", True, 0),
        ("update", "exec sleep 60", "exit 1", False, 0),
        ("update", "exec sleep 60", "exec sleep 60", False, 1),
        ("SIGTERM", "trap 'exit 75' TERM; echo; while :; do sleep 0.01; done", "exit 75", True, 0),
        ("SIGTERM", "exec sleep 60", "exit 75", False, 0),
    ],
)
def test_ends_that_are_documented(tmp_path, monkeypatch, kind, own, other, documented, hung):
    monkeypatch.setattr(soak_processes, "HUNG_SECONDS", 1.0)
    processes = []
    for i, words in enumerate((other, own if "echo" in own else f"echo; {own}")):
        (tmp_path / f"run-{i}.err").write_text(words)
        processes.append(subprocess.Popen(["sh", "-c", words], stdout=subprocess.PIPE, text=True))
    assert processes[1].stdout.readline() == "\n"
    end = struck(Strike(kind, 1, 0, 0.0), tmp_path / "run", processes)
    for process in processes:
        process.stdout.close()
    assert (end["as_documented"], end["hung"]) == (documented, hung)
    assert end["seconds"] < 5
    assert end.get("errors", [other])[0] == other
    if kind != "SIGTERM":
        assert end["statuses"][1] == -signal.SIGKILL


def test_every_kind_and_every_process_is_drawn_before_one_comes_again():
    strikes = draw(Options(processes=3, kills=10))
    assert sorted(strike.kind for strike in strikes[:5]) == sorted(KINDS)
    assert sorted(strike.kind for strike in strikes[5:10]) == sorted(KINDS)
    assert sorted(strike.victim for strike in strikes[:9]) == sorted([0, 1, 2] * 3)
    assert [strike.kind for strike in strikes[10:]] == ["SIGTERM"]
    assert draw(Options(kills=0)) == []
