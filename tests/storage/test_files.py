"""Small files are replaced whole; a bad place is distinguished from a disk in trouble."""

import errno
import os
import re
from pathlib import Path

import pytest

from mora_jax.errors import InputError
from train.storage import files


def test_a_file_is_synced_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    """As after a loss of power: what was not synced may be gone."""
    path, seen = tmp_path / "a.json", []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced = Path(f"/proc/self/fd/{descriptor}").readlink()
        seen.append((re.sub("[0-9a-f]{16}", "RANDOM", synced.name), path.read_text()))
        real(descriptor)

    path.write_text("old")
    monkeypatch.setattr(os, "fsync", fsync)
    files.write_whole(path, "new")
    assert seen == [("a.json.RANDOM.part", "old"), (tmp_path.name, "new")]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_a_file_that_cannot_be_written_is_unchanged(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "a.json"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*a\.json"):
        files.write_whole(path, "new")
    assert path.read_text() == "old"


def test_a_file_system_that_cannot_sync(tmp_path, monkeypatch):
    def unable(descriptor: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", unable)
    files.write_whole(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "new"


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EROFS, InputError),
        (errno.EACCES, InputError),
        (errno.ENOTDIR, InputError),
        (errno.ENOSPC, OSError),
        (errno.EDQUOT, OSError),
        (errno.EIO, OSError),
    ],
    ids=errno.errorcode.get,
)
def test_bad_places_and_disks_in_trouble(number, kind):
    with pytest.raises(kind, match=os.strerror(number)), files.writable("here", "run_dir cannot be made"):
        raise OSError(number, os.strerror(number))


def test_a_folder_in_the_place_of_a_file_is_a_bad_place(tmp_path):
    (tmp_path / "a.json").mkdir()
    with pytest.raises(OSError, match=r"Is a directory: .*a\.json") as refused:
        files.write_whole(tmp_path / "a.json", "new")
    assert files.is_bad_place(refused.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
