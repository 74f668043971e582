"""Small files are read only if they are regular files of the expected size and form."""

import json
import math
import os

import pytest

from mora_jax.errors import InputError
from mora_jax.io import is_unicode, json_text, path_of, read_bytes, read_object, read_text, refuse_lfs_pointer


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


def test_a_git_lfs_pointer_is_not_taken_for_its_file(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (tmp_path / "f").write_bytes(pointer)
    with pytest.raises(InputError, match="f is a Git LFS pointer: run git lfs pull"):
        read_bytes(tmp_path / "f", 200)
    refuse_lfs_pointer("f", b"version 1" + pointer)
    refuse_lfs_pointer("f", b"")


@pytest.mark.parametrize("path", ["az://a/b", "http://a/b", "hf://a/b", "file:///a", "GS://a"])
def test_a_url_of_anything_but_a_bucket_is_no_path(path):
    for use in (lambda: path_of(path), lambda: read_bytes(path, 10)):
        with pytest.raises(InputError, match=f"^{path} is no path: give one on a disk, or in a bucket"):
            use()
    with pytest.raises(InputError, match=f"^--out {path} is no path"):
        path_of(path, "--out")


def test_paths_on_disks_and_in_buckets(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for known in ("gs://a/b", "s3://a", "/a/b", "a:b", ".", "a/~"):
        assert str(path_of(known)) == known
    assert str(path_of("~/runs")) == "/home/me/runs"
    for path in ("~nobody_here/x", "./~nobody_here"):  # pathlib takes the ./ away
        with pytest.raises(InputError, match=f"{path} is read as the home folder of a user"):
            path_of(path)
    for path in ("a\\b", "a\nb", "a\x1b[0m"):
        with pytest.raises(InputError, match="has a backslash or a character that cannot be printed"):
            path_of(path)
    with pytest.raises(InputError, match=r"^run_dir is empty"):
        path_of("", "run_dir")


def test_text_must_be_utf_8_and_an_object_must_be_one(tmp_path):
    (tmp_path / "f").write_bytes(b"\xff")
    with pytest.raises(InputError, match="f is not UTF-8 text"):
        read_text(tmp_path / "f", 10)
    (tmp_path / "f").write_text("[1]")
    with pytest.raises(InputError, match="f must hold a JSON object"):
        read_object(tmp_path / "f")
    (tmp_path / "f").write_text('{"a": 1}')
    assert read_object(tmp_path / "f") == {"a": 1}


def test_json_has_no_nan():
    value = {"a": math.nan, "b": [math.inf, -math.inf, 1.5], "c": {"d": (math.nan, 2)}}
    text = json_text(value)
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": "NaN",
        "b": ["Infinity", "-Infinity", 1.5],
        "c": {"d": ["NaN", 2]},
    }


def test_a_lone_surrogate_is_no_unicode():
    for value in ("a\ud800", {"a": ["b\udcff"]}, {"\ud800": 1}):
        assert not is_unicode(value)
    for value in ("aä😀", {"ä": ["😀", None, 1.5]}):
        assert is_unicode(value)
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert not is_unicode(deep)
