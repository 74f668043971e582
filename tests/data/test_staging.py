"""Data sets in buckets: downloaded once, checked and resumed, with the same rows as on a disk."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
from etils import epath

from mora_jax.errors import InputError
from train.data.rows import layout
from train.data.rows.build import prepare
from train.data.rows.info import load_info, unigram_perplexity
from train.data.rows.read import train_batches
from train.data.rows.staging import staged
from train.storage import buckets

SHARDS = 2


@pytest.fixture
def remote(bucket: str, tiny_data: Path) -> str:
    """The tiny data set in a bucket."""
    for name in buckets.files(tiny_data):
        (epath.Path(f"{bucket}/data/tiny") / name).write_bytes((tiny_data / name).read_bytes())
    return f"{bucket}/data/tiny"


@pytest.fixture
def downloaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all objects that are downloaded from now on."""
    names, store = [], fsspec.get_filesystem_class("s3")
    real = store.get_file

    def get_file(self, path, *args, **kwargs):
        names.append(path.rpartition("/")[2])
        return real(self, path, *args, **kwargs)

    monkeypatch.setattr(store, "get_file", get_file)
    return names


def test_the_rows_are_the_same(remote: str, tiny_data: Path):
    here, there = load_info(str(tiny_data)), load_info(remote)
    assert there.directory != remote
    assert (there.rows, there.tokens, there.tokenizer_sha256) == (
        here.rows,
        here.tokens,
        here.tokenizer_sha256,
    )
    assert unigram_perplexity(there) == unigram_perplexity(here)
    for _, ours, theirs in zip(
        range(3), train_batches(there, 4, 0, 5), train_batches(here, 4, 0, 5), strict=False
    ):
        np.testing.assert_array_equal(ours.tokens_BT, theirs.tokens_BT)


def test_unchanged_objects_are_not_downloaded_again(remote: str, downloaded: list[str]):
    folder = staged(remote)
    assert sorted(downloaded) == sorted(Path(name).name for name in buckets.files(folder))
    downloaded.clear()
    assert staged(remote) == folder
    assert downloaded == []
    cut = layout.shard_file("train", 1, SHARDS)
    (folder / cut).write_bytes(b"cut")
    (folder / "unigram.npz.part").write_bytes(b"of a kill")
    (folder / layout.shard_file("train", 2, 3)).write_bytes(b"of another data set")
    (epath.Path(remote) / "metadata.json").write_bytes((epath.Path(remote) / "metadata.json").read_bytes())
    load_info(remote)
    assert sorted(downloaded) == sorted([cut, "metadata.json"])
    assert sorted(buckets.files(folder)) == sorted(buckets.objects(remote))


def test_only_the_needed_rows_are_downloaded(remote: str, downloaded: list[str]):
    load_info(remote, splits=())
    assert not any(layout.is_rows(name) for name in downloaded)
    load_info(remote, splits=("validation",))
    assert [name for name in downloaded if layout.is_rows(name)] == [layout.shard_file("validation", 0, 1)]
    load_info(remote)
    assert len(downloaded) == len(set(downloaded)) == len(buckets.objects(remote))


def test_an_interrupted_download_is_resumed(remote: str, downloaded: list[str], monkeypatch):
    store = fsspec.get_filesystem_class("s3")
    real = store.get_file

    def fails_at_last(self, path, *args, **kwargs):
        if "rows-train" in path:
            time.sleep(0.5)
            raise ConnectionResetError(104, "Connection reset by peer")
        return real(self, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(store, "get_file", fails_at_last)
        with pytest.raises(OSError, match="Connection reset by peer"):
            staged(remote)
    downloaded.clear()
    staged(remote)
    assert sorted(downloaded) == [layout.shard_file("train", index, SHARDS) for index in range(SHARDS)]


def test_damaged_versions_cause_a_full_download(remote: str, downloaded: list[str]):
    folder = staged(remote)
    for harm in ("[]", '{"a": 1}', "{", '{"a": [1, 2, 3]}'):
        downloaded.clear()
        (folder.parent / "versions.json").write_text(harm)
        assert load_info(remote).rows["train"] > 0
        assert len(downloaded) == len(buckets.objects(remote))


def test_a_disk_without_locks_causes_a_warning(remote: str, monkeypatch: pytest.MonkeyPatch, capfd):
    def none(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", none)
    place = staged(remote)
    assert layout.DESCRIBED in {path.name for path in place.iterdir()}
    assert f"warning: {place.parent} cannot be locked: No locks available" in capfd.readouterr().err


def test_an_empty_bucket(bucket: str):
    with pytest.raises(InputError, match=r"s3://bucket/none is empty: it holds no data set"):
        load_info(f"{bucket}/none")


def test_no_room(remote: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(InputError, match=r"has room for 0.0 GB, .* set MORA_CACHE"):
        staged(remote)


STAGE = """
import os, sys
from pathlib import Path
import fake_store
fake_store.install(Path(os.environ[fake_store.ROOT]))
from train.data.rows.staging import staged
print("ready", flush=True)
input()
print(staged(sys.argv[1]), flush=True)
"""


@pytest.mark.slow
def test_several_processes_download_once(remote: str, tmp_path: Path):
    root = Path(__file__).parents[2]
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", STAGE, remote],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": f"{root}:{root / 'tests/support'}"},
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    said = {process.communicate("go\n", timeout=60)[0].strip() for process in processes}
    assert all(process.returncode == 0 for process in processes)
    (folder,) = said
    assert sorted(buckets.files(Path(folder))) == sorted(buckets.objects(remote))
    ages = {path.stat().st_mtime_ns for path in Path(folder).iterdir()}
    staged(remote)
    assert {path.stat().st_mtime_ns for path in Path(folder).iterdir()} == ages


def prepared(text: Path, out: str, sequence_length: int = 32):
    source, validation = (str(text / f"c4-{split}.*") for split in ("train", "validation"))
    return prepare(source, validation, str(text / "t.model"), sequence_length, out, workers=1)


def test_a_data_set_is_prepared_into_a_bucket(bucket: str, tiny_text: Path, tiny_data: Path):
    out = f"{bucket}/data/new"
    info = prepared(tiny_text, out)
    assert info.rows == load_info(str(tiny_data)).rows
    assert {name: there.size for name, there in buckets.objects(out).items()} == buckets.files(tiny_data)
    assert not buckets.files(buckets.cache_folder() / "prepare")
    first = buckets.objects(out)
    assert prepared(tiny_text, out).rows == info.rows
    assert buckets.objects(out) == first  # it was there
    with pytest.raises(InputError, match=r"new was prepared with another sequence_length \(32, now 16\)"):
        prepared(tiny_text, out, sequence_length=16)
    with pytest.raises(InputError, match="is not empty and not a prepared data set"):
        prepared(tiny_text, f"{bucket}/data")


def test_an_interrupted_upload_is_resumed(bucket: str, tiny_text: Path, tiny_data: Path, monkeypatch):
    out, store, sent = f"{bucket}/data/new", fsspec.get_filesystem_class("s3"), []
    real = store.put_file

    def put_file(self, local, remote, **kwargs):
        sent.append(remote.rpartition("/")[2])
        if len(sent) == 4:
            raise ConnectionResetError(104, "Connection reset by peer")
        real(self, local, remote, **kwargs)

    monkeypatch.setattr(store, "put_file", put_file)
    with pytest.raises(OSError, match="Connection reset by peer"):
        prepared(tiny_text, out)
    assert layout.DESCRIBED not in buckets.objects(out)
    with pytest.raises(InputError, match="is not finished"):
        load_info(out)
    there = set(buckets.objects(out))
    sent.append("")
    prepared(tiny_text, out)
    assert sent[-1] == layout.DESCRIBED
    again = set(sent[sent.index("") + 1 :])
    assert again.isdisjoint(there - {layout.SETTINGS, layout.TEXT})
    assert {name: found.size for name, found in buckets.objects(out).items()} == buckets.files(tiny_data)
