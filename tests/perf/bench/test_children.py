"""Measurements in processes of their own."""

import os
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
        print("the last words", file=sys.stderr, flush=True)
        import os; os._exit(3)
    if job == "sleep":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        open(PID, "w").write(str(child.pid))
        time.sleep(60)
    return {"twice": 2 * job}

children.serve(work)
"""


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "a_child.py").write_text(MODULE.replace("PID", repr(str(tmp_path / "pid"))))
    root = Path(__file__).parents[3]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{root}")
    return "a_child"


def test_the_result_comes_back(child: str):
    assert children.call(child, 21, 60) == {"twice": 42}


def test_a_failure_is_one_line(child: str):
    assert children.call(child, "fail", 60) == {"error": "ValueError: first line"}


def test_a_death_is_told_with_its_last_words(child: str):
    assert children.call(child, "die", 60) == {"error": "died with status 3: the last words"}
    gone = children.call("no_such_module", 1, 60)["error"]
    assert gone.startswith("died with status 1: ")
    assert "no_such_module" in gone


def test_a_time_limit_ends_it_and_what_it_started(child: str, tmp_path: Path):
    began = time.monotonic()
    assert children.call(child, "sleep", 4) == {"error": "took more than 4 s"}
    assert time.monotonic() - began < 20
    grandchild = int((tmp_path / "pid").read_text())
    for _ in range(50):  # until whoever inherits it has let it go
        if not alive(grandchild):
            return
        time.sleep(0.1)
    raise AssertionError("the grandchild lives")


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not (status.exists() and status.read_text().split()[2] == "Z")
