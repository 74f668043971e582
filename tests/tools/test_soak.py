"""`make soak` with a few kills."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from run_folders import missing_or_repeated

SOAK = Path(__file__).parent / "soak.py"


@pytest.mark.slow
def test_a_run_that_is_killed_becomes_the_undisturbed_one(tmp_path):
    words = ["--kills", "3", "--steps", "40", "--folder", str(tmp_path / "soak")]
    report = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, str(SOAK), *words, "--report", str(report)],
        env=os.environ | {"PYTHONPATH": str(SOAK.parents[2])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(report.read_text())
    assert figures["equal"]
    assert figures["kills"] == sum(figures["kills_by_kind"].values()) == 3
    assert figures["preparation_kills"] == 1
    assert set(figures["final_hashes"]) == {figures["undisturbed_hash"]}
    assert figures["lines_compared"] >= 40
    assert figures["differing_losses"] == figures["differing_lines"] == figures["lines_lost_or_doubled"] == 0


@pytest.mark.parametrize(
    ("steps", "counted"), [((0, 1, 2), 0), ((0, 2), 1), ((0, 1, 1, 2), 1), ((0, 1, 1), 2)]
)
def test_lines_that_are_lost_or_doubled_are_counted(tmp_path, steps, counted):
    for name, of in (("ours", steps), ("theirs", (0, 1, 2))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(f'{{"step": {n}, "loss": 1}}\n' for n in of))
    assert missing_or_repeated(tmp_path / "ours", tmp_path / "theirs") == counted
