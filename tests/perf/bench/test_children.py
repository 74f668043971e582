"""Measurements in processes of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from train.perf.bench import children

MODULE = """
import subprocess, sys, time
from train.perf.bench import children
def work(job):
    print("noise")
    if job == "fail":
        raise ValueError("first line\\nsecond line")
    if job == "die":
        print("the last line", file=sys.stderr, flush=True)
        import os; os._exit(3)
    if job == "sleep":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        open(PID, "w").write(str(child.pid))
        time.sleep(60)
    if job == "wait":
        import os; open(PID, "w").write(str(os.getpid()))
        time.sleep(60)
    if job == "rows":
        return rows()
    if job == "slow rows":
        return slow_rows()
    return {"twice": 2 * job}

def rows():
    yield {"row": 1}
    time.sleep(0.5)
    yield {"row": 2}
    raise ValueError("no third")

def slow_rows():
    for row in range(4):
        time.sleep(3)
        yield {"row": row}
    time.sleep(60)

children.serve(work)
"""


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "a_child.py").write_text(MODULE.replace("PID", repr(str(tmp_path / "pid"))))
    root = Path(__file__).parents[3]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{root}")
    return "a_child"


def test_the_result_is_returned(child: str):
    assert children.call(child, 21, 60) == {"twice": 42}


def test_rows_are_yielded_one_by_one_and_the_last_says_what_failed(child: str):
    found = children.stream(child, "rows", 60)
    assert next(found) == {"row": 1}
    assert list(found) == [{"row": 2}, {"error": "ValueError: no third"}]


@pytest.mark.slow  # 22 s
def test_the_time_limit_is_that_of_each_row(child: str):
    found = list(children.stream(child, "slow rows", 10))
    assert found == [*({"row": row} for row in range(4)), {"error": "timed out after 10 s"}]


def test_a_failure_is_one_line(child: str):
    assert children.call(child, "fail", 60) == {"error": "ValueError: first line"}


def test_a_death_is_reported_with_its_last_line(child: str):
    assert children.call(child, "die", 60) == {"error": "died with status 3: the last line"}
    gone = children.call("no_such_module", 1, 60)["error"]
    assert gone.startswith("died with status 1: ")
    assert "no_such_module" in gone


def test_a_timeout_ends_the_process_and_its_children(child: str, tmp_path: Path):
    began = time.monotonic()
    assert children.call(child, "sleep", 4) == {"error": "timed out after 4 s"}
    assert time.monotonic() - began < 20
    grandchild = int((tmp_path / "pid").read_text())
    for _ in range(50):  # until the process that inherits it has reaped it
        if not alive(grandchild):
            return
        time.sleep(0.1)
    raise AssertionError("the grandchild is alive")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals a process when its parent ends")
@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_caller_leaves_no_process(child: str, tmp_path: Path, by: signal.Signals):
    words = f"from train.perf.bench import children; children.call({child!r}, 'wait', 60)"
    pid, until = tmp_path / "pid", time.monotonic() + 60
    with subprocess.Popen([sys.executable, "-c", words]) as caller:
        try:
            while not (pid.exists() and pid.read_text()) and caller.poll() is None:
                assert time.monotonic() < until
                time.sleep(0.1)
            caller.send_signal(by)
            caller.wait(20)
        finally:
            caller.kill()
    for _ in range(50):
        if not alive(int(pid.read_text())):
            return
        time.sleep(0.1)
    raise AssertionError("the process is alive")


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not (status.exists() and status.read_text().split()[2] == "Z")
