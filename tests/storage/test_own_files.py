"""What is not this program's own is neither overwritten nor removed, and no link leads a write outside."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mora_jax.errors import InputError
from train.storage import files, lock


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    path = tmp_path / "outside.txt"
    path.write_text("years of work")
    return path


def test_a_file_or_link_that_is_called_part_stays(tmp_path: Path, outside: Path):
    (tmp_path / "a.json.part").symlink_to(outside)
    files.write_whole(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "new"
    assert (tmp_path / "a.json.part").read_text() == "years of work"


def test_a_link_is_replaced_and_not_followed(tmp_path: Path, outside: Path):
    (tmp_path / "a.json").symlink_to(outside)
    files.write_whole(tmp_path / "a.json", "new")
    assert outside.read_text() == "years of work"
    assert not (tmp_path / "a.json").is_symlink()


def test_what_a_kill_left_of_a_write_is_removed_and_nothing_else(tmp_path: Path, monkeypatch):
    mine = {"a.json.part", "0123456789abcdef.part", "a.json.0123456789ABCDEF.part"}
    for name in mine:
        (tmp_path / name).touch()
    written = []
    monkeypatch.setattr(files, "sync", lambda path: written.append(path.name))
    files.write_whole(tmp_path / "a.json", "new")
    (tmp_path / written[0]).touch()
    files.remove_parts(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == mine | {"a.json"}


@pytest.mark.parametrize("there", [True, False], ids=["to a file", "to nothing"])
def test_a_lock_that_is_a_link_is_refused(tmp_path: Path, outside: Path, there: bool):
    if not there:
        outside.unlink()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/lock").symlink_to(outside)
    refused = pytest.raises(InputError, match=r"run/lock is a link, .* remove it")
    with refused, lock.lock_run(f"{tmp_path}/run"):
        pass
    assert outside.exists() == there
    assert not there or outside.read_text() == "years of work"


def test_a_file_called_lock_that_is_no_lock_is_refused(tmp_path: Path):
    (tmp_path / "lock").write_text("combination: 4711")
    with (
        pytest.raises(InputError, match=r"/lock is not a lock of mora; move it"),
        lock.lock_run(str(tmp_path)),
    ):
        pass
    assert (tmp_path / "lock").read_text() == "combination: 4711"


@pytest.mark.parametrize("text", ["", "process 1", "process 123 on host-7.example"])
def test_the_lock_of_an_ended_or_killed_program_is_taken(tmp_path: Path, text: str):
    (tmp_path / "lock").write_text(text)
    with lock.lock_run(str(tmp_path)):
        pass


HOLD = """
import sys, time
from train.storage import lock
with lock.lock_output(sys.argv[1], "--out"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_an_output_is_locked_before_it_exists(tmp_path: Path):
    out = str(tmp_path / "new" / "model")
    words = [sys.executable, "-W", "ignore", "-c", HOLD, out]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(InputError, match=rf"{out} is in use by process {other.pid} on .* another --out"),
            lock.lock_output(out, "--out"),
        ):
            pass
        with lock.lock_output(f"{out}2", "--out"):
            pass
        other.kill()
    with lock.lock_output(out, "--out"):
        pass
    assert list((tmp_path / "new").iterdir()) == []


def test_a_lock_that_its_holder_removes_meanwhile_is_made_anew(tmp_path: Path, monkeypatch):
    """The holder of an output's lock removes it at the end, perhaps after another program opened it."""
    path, real = tmp_path / "lock", lock._try_lock

    def late(file, folder: str) -> bool:
        monkeypatch.setattr(lock, "_try_lock", real)
        path.unlink()
        return real(file, folder)

    monkeypatch.setattr(lock, "_try_lock", late)
    with lock.lock_file(path, "--out", "out") as check_there:
        check_there()


@pytest.mark.parametrize("mode", ["ab", "a+b"])
def test_a_pipe_in_the_place_of_a_file_is_refused(tmp_path: Path, mode: str):
    os.mkfifo(tmp_path / "lock")
    with pytest.raises(InputError, match="lock is not a regular file; remove it"):
        files.open_own(tmp_path / "lock", mode)


def test_an_output_is_free_of_what_killed_programs_left_of_it(tmp_path: Path):
    left = tmp_path / "t.model.0123456789abcdef.part"
    others = {tmp_path / "u.model.0123456789abcdef.part", tmp_path / "t.model.part", tmp_path / "t.model"}
    for path in (left, *others):
        path.touch()
    with lock.lock_output(str(tmp_path / "t.model"), "--out"):
        pass
    assert set(tmp_path.iterdir()) == others


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_result_replaces_a_file_only_if_asked_to(tmp_path: Path, outside: Path, overwrite: bool):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nothing")
    files.check_free("", "--out", overwrite)
    files.check_free(tmp_path / "new", "--out", overwrite)
    for place in (outside, link):
        with contextlib.nullcontext() if overwrite else pytest.raises(InputError, match="exists already"):
            files.check_free(place, "--out", overwrite)
    with pytest.raises(InputError, match="is a folder"):
        files.check_free(tmp_path, "--out", overwrite)


def test_a_result_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append((path, mode)))
    with pytest.raises(InputError, match=f"--out .*/new/o: nothing can be written to {tmp_path}"):
        files.check_free(tmp_path / "new" / "o", "--out", False)
    assert asked == [(tmp_path, os.W_OK)]
