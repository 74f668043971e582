"""Folders in object stores: what is in them, copies both ways, and one line for what goes wrong."""

import sys
import types
from pathlib import Path

import fsspec
import pytest
from etils import epath

from mora_jax.errors import InputError
from train.cli import main as cli
from train.storage import buckets


def put(url: str, content: bytes) -> None:
    epath.Path(url).write_bytes(content)


def test_the_objects_of_a_folder(bucket: str):
    for name in ("a/x", "a/sub/y", "ab/z"):
        put(f"{bucket}/{name}", name.encode())
    found = buckets.objects(f"{bucket}/a")
    assert {name: there.size for name, there in found.items()} == {"x": 3, "sub/y": 7}
    assert buckets.objects(f"{bucket}/none") == {}
    put(f"{bucket}/a/x", b"a/X")
    again = buckets.objects(f"{bucket}/a")
    assert again["x"].size == 3
    assert again["x"] != found["x"]
    assert again["sub/y"] == found["sub/y"]


def test_a_missing_bucket(bucket: str, monkeypatch: pytest.MonkeyPatch):
    def missing(self, path, **kwargs):
        raise FileNotFoundError(2, "The specified bucket does not exist")

    monkeypatch.setattr(fsspec.get_filesystem_class("s3"), "find", missing)
    with pytest.raises(InputError, match="none/a cannot be listed: The specified bucket"):
        buckets.objects("s3://none/a")


def test_upload_and_download(bucket: str, tmp_path: Path):
    for number in range(20):
        path = tmp_path / f"here/{number % 3}/{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([number]) * number * 1000)
    sent, received = [], []
    names = buckets.files(tmp_path / "here")
    buckets.upload(tmp_path / "here", f"{bucket}/there", names, sent.append)
    back = buckets.download(f"{bucket}/there", tmp_path / "back", names, received.append)
    assert sorted(back) == sorted(names)
    assert sum(sent) == sum(received) == sum(names.values()) > 0
    for name in names:
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()


def test_an_object_of_another_size_than_uploaded_is_an_error(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "x").write_bytes(b"whole")
    real = fsspec.get_filesystem_class("s3").put_file

    def cut(store, local, remote, **kwargs):
        real(store, local, remote, **kwargs)
        put(f"s3://{remote.removeprefix('s3://')}", b"who")

    monkeypatch.setattr(fsspec.get_filesystem_class("s3"), "put_file", cut)
    with pytest.raises(OSError, match=r"not stored as it was uploaded: 's3://bucket/f/x'"):
        buckets.upload(tmp_path, f"{bucket}/f", ["x"], lambda n: None)


def test_an_interrupted_download_leaves_nothing(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    put(f"{bucket}/f/x", b"whole")

    def broken(store, remote, local, **kwargs):
        Path(local).write_bytes(b"who")
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(fsspec.get_filesystem_class("s3"), "get_file", broken)
    with pytest.raises(OSError, match=r"Connection reset by peer: 's3://bucket/f/x'"):
        list(buckets.download(f"{bucket}/f", tmp_path / "f", ["x"], lambda n: None))
    assert not (tmp_path / "f/x").exists()


def test_a_disk_without_room(tmp_path: Path):
    buckets.check_room(1000, tmp_path / "cache")
    with pytest.raises(InputError, match=r"cache has room for .* GB, but 1000000000.0 GB are needed"):
        buckets.check_room(10**18, tmp_path / "cache")


def test_two_folders_never_share_a_stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv(buckets.CACHE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    places = [("runs", "gs://a/run"), ("runs", "s3://a/run"), ("data", "gs://a/run"), ("runs", "gs://b/run")]
    found = {buckets.stand_in(*place) for place in places}
    assert len(found) == 4
    assert {place.name for place in found} == {"run"}
    assert all(place.is_relative_to(tmp_path / "mora_jax") for place in found)
    assert buckets.stand_in("runs", "gs://a/run/") in found
    monkeypatch.setenv(buckets.CACHE, str(tmp_path / "elsewhere"))
    assert buckets.stand_in("runs", "gs://a/run").is_relative_to(tmp_path / "elsewhere")


class ForeignError(Exception):
    """As the packages raise it, which know no OSError."""


ForeignError.__module__ = "botocore.exceptions"


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ForeignError("no credentials\nat all"), 74, "mora: ForeignError: no credentials at all"),
        (PermissionError(13, "Access Denied", "s3://a"), 2, "mora: s3://a: Access Denied"),
    ],
    ids=["of a package", "of the system"],
)
def test_errors_of_stores_are_one_line(error, status, line, monkeypatch, capsys):
    monkeypatch.setattr(cli, "run", lambda args: (_ for _ in ()).throw(error))
    with pytest.raises(SystemExit) as ended:
        cli.main(["export"])
    assert ended.value.code == status
    assert capsys.readouterr().err == f"{line}\n"


def test_other_errors_are_bugs(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(cli, "run", lambda args: (_ for _ in ()).throw(ZeroDivisionError()))
    with pytest.raises(SystemExit) as ended:
        cli.main(["export"])
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("Traceback")


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    fsspec.filesystem.__globals__["_registry"].pop("gs", None)
    with pytest.raises(InputError, match=r"need the package gcsfs: pip install 'mora_jax\[cloud\]'"):
        buckets.objects("gs://bucket/a")


def test_listings_are_not_cached():
    made = types.SimpleNamespace(protocol=("gs", "gcs"))
    for protocol in ("gs", "s3"):
        made.protocol = protocol
        assert fsspec.config.apply_config(made, {}) == {"use_listings_cache": False}
