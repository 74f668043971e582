"""The library that disturbs file operations, and tests/tools/file_faults.py with a few faults."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from file_faults import Faults, Plan

from train.console import exits

pytestmark = pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler, cc")
TOOL = Path(__file__).parent / "file_faults.py"
SCRIPT = "echo first > a; echo second >> a; mv a b; mkdir d; rm b; cd ..; echo outside > o"


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Faults:
    return Faults(tmp_path_factory.mktemp("faults"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "place").mkdir()
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def words(operations: list[str]) -> list[tuple[str, str]]:
    """Kind and path of each operation; systems have several functions of a kind."""
    kinds = ("open", "write", "rename", "mkdir", "unlink")
    pairs = (operation.split(" ") for operation in operations)
    return [(next(kind for kind in kinds if name.startswith(kind)), path) for name, path in pairs]


def test_what_a_program_and_its_children_do_is_counted(faults: Faults, place: Path):
    status, err, operations = faults.run(["sh", "-c", SCRIPT], place)
    assert (status, err) == (0, "")
    written = [("open", "/a"), ("write", "/a")] * 2
    assert words(operations) == [*written, ("rename", "/b"), ("mkdir", "/d"), ("unlink", "/b")]


def test_a_kill_comes_after_half_of_a_write(faults: Faults, place: Path):
    status, _, operations = faults.run(["sh", "-c", SCRIPT], place, Plan(4, "KILL"))
    assert status == -signal.SIGKILL
    assert len(operations) == 4
    assert (place / "a").read_text() == "first\nsec"


@pytest.mark.parametrize(
    ("plan", "left"), [(Plan(4, "EIO"), {"d"}), (Plan(4, "ENOSPC"), set())], ids=["EIO", "ENOSPC"]
)
def test_one_operation_fails_or_all_that_need_space(faults: Faults, place: Path, plan: Plan, left: set[str]):
    _, err, _ = faults.run(["sh", "-c", SCRIPT], place, plan, {"LC_ALL": "C"})
    assert ("No space left on device" if plan.action == "ENOSPC" else "error") in err
    assert {path.name for path in place.iterdir()} == left


SAVES = """
import sys, jax.numpy as jnp
from train.cli.explain import explain
from train.run.checkpoint import Checkpoints
try:
    with Checkpoints(sys.argv[1]) as saved:
        for step in (1, 2):
            saved.save(step, {f"a{n}": jnp.arange(99.0) for n in range(4)}, {})
except OSError as error:
    sys.exit(explain(error))
"""


@pytest.mark.slow  # tests/runtime/test_workarounds.py has what is particular to it
def test_a_save_without_a_folder_ends_at_once_with_one_line(faults: Faults, place: Path):
    """Orbax waits five minutes for the folder, and then logs pages."""
    program = [sys.executable, "-c", SAVES, str(place)]
    status, _, operations = faults.run(program, place)
    assert status == 0
    number = 1 + max(n for n, name in enumerate(operations) if name == "mkdir /2.orbax-checkpoint-tmp")
    shutil.rmtree(place)
    place.mkdir()
    status, err, _ = faults.run(program, place, Plan(number, "ENOSPC"), seconds=120)
    assert (status, err) == (exits.DISK, f"mora: {place}/2: could not be saved: No space left on device\n")


@pytest.mark.slow
def test_a_command_that_is_disturbed_makes_what_it_would_have_made(tmp_path: Path):
    report = tmp_path / "report.json"
    options = ["--only", "train-tokenizer", "--kills", "2", "--failures", "2", "--report", str(report)]
    done = subprocess.run(
        [sys.executable, str(TOOL), *options],
        env=os.environ | {"PYTHONPATH": str(TOOL.parents[2])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    trials = json.loads(report.read_text())
    assert [trial["action"] for trial in trials] == ["KILL"] * 2 + ["EIO", "ENOSPC"]
    assert [trial["status"] for trial in trials[:2]] == [-signal.SIGKILL] * 2
    assert all(trial["wrong"] == "" and trial["starts"] for trial in trials)
