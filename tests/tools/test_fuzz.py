"""A short run of tests/tools/fuzz.py, and that it finds what it looks for."""

import random
from pathlib import Path

import changes
import fuzz
import pytest

CASES = {"config": 40, "text": 150, "weights": 120, "manifest": 150, "description": 60, "tokenizer": 10}
CASES |= {"data_set": 40, "pieces": 100, "parquet": 60, "tokenizer_json": 40}


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_no_changed_file_crashes_its_reader(target: str, tmp_path: Path):
    for number in range(CASES[target]):
        wrong = fuzz.crash(target, 0, number, tmp_path / "case")
        assert not wrong, f"--target {target} --only {number}: {wrong}"


@pytest.mark.parametrize("target", [name for name in fuzz.TARGETS if name != "manifest"])
def test_files_are_good_before_they_are_changed(
    target: str,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
):
    """Else every case would end at the first check. (A manifest names a file that is never there.)"""
    first = tmp_path_factory.mktemp("first")
    write, read = fuzz.TARGETS[target][1:]
    write(random.Random(0), first)  # makes what is cached, before random names become equal
    monkeypatch.setattr(changes, "change", lambda rng, value: value)
    monkeypatch.setattr(changes, "change_bytes", lambda rng, content: content)
    monkeypatch.setattr(fuzz, "ALIASES", ("",))
    monkeypatch.setattr(random.Random, "random", lambda self: 0.5)
    monkeypatch.setattr(random.Random, "choice", lambda self, options: options[0])
    write(random.Random(0), tmp_path)
    read(tmp_path)


@pytest.mark.parametrize(
    ("target", "number"),
    [
        ("weights", 36),
        ("weights", 1752),
        ("config", 401),
        ("config", 6141),
        ("tokenizer", 142),
        ("tokenizer", 709),
        ("pieces", 155),
        ("data_set", 6),
        ("data_set", 904),
        ("data_set", 1064),
    ],
)
def test_what_once_crashed(target: str, number: int, tmp_path: Path):
    assert not fuzz.crash(target, 0, number, tmp_path / "case")


def test_a_crash_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def careless(folder: Path) -> None:
        raise KeyError(folder.name)

    monkeypatch.setitem(fuzz.TARGETS, "text", fuzz.TARGETS["text"]._replace(read=careless))
    assert "KeyError: 'case'" in fuzz.crash("text", 0, 0, tmp_path / "case")
