"""Small files are read only if they are regular files of the expected size and form."""

import os

import pytest

from mora_jax.errors import InputError
from mora_jax.io import read_bytes, read_object, read_text


def test_a_file_of_exactly_the_limit_is_read(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert read_bytes(tmp_path / "f", 3) == b"abc"
    with pytest.raises(InputError, match="it has 3 bytes; at most 2 are read"):
        read_bytes(tmp_path / "f", 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "is missing"),
        (lambda path: path.mkdir(), "is not a regular file"),
        (os.mkfifo, "is not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "is not a regular file"),
    ],
    ids=["missing", "folder", "pipe", "device"],
)
def test_other_things_than_files_are_refused(tmp_path, make, message):
    make(tmp_path / "f")
    with pytest.raises(InputError, match=f"f {message}"):
        read_bytes(tmp_path / "f", 10)


def test_an_unknown_file_system_is_refused():
    with pytest.raises(InputError, match="'nofs://f' cannot be read: there is no file system 'nofs://'"):
        read_bytes("nofs://f", 10)


def test_text_must_be_utf_8_and_an_object_must_be_one(tmp_path):
    (tmp_path / "f").write_bytes(b"\xff")
    with pytest.raises(InputError, match="f is not UTF-8 text"):
        read_text(tmp_path / "f", 10)
    (tmp_path / "f").write_text("[1]")
    with pytest.raises(InputError, match="f must hold a JSON object"):
        read_object(tmp_path / "f")
    (tmp_path / "f").write_text('{"a": 1}')
    assert read_object(tmp_path / "f") == {"a": 1}
