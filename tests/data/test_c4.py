"""Files in C4's format: what is read, and one clear line for each way in which they can be broken."""

import gzip
import json
import os
from pathlib import Path

import pytest

from mora_jax.errors import InputError
from train.data.text import c4

TEXTS = ["First text.", "Zweiter, mit Umlaut: ü", "third\nwith lines"]


def line(text: object) -> bytes:
    return json.dumps({"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "x"}).encode() + b"\n"


def write(path: Path, *lines: bytes) -> Path:
    data = b"".join(lines)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["a.json.gz", "a.jsonl.gz", "a.json", "a.jsonl"])
def test_documents_of_plain_and_gzip_files(tmp_path: Path, name: str):
    path = write(tmp_path / name, *map(line, TEXTS))
    assert list(c4.documents(path, skip_lines=0)) == TEXTS


def test_blank_lines_and_a_missing_last_newline_lose_nothing(tmp_path: Path):
    path = write(tmp_path / "a.json", line("one"), b"\n", b"  \n", line("two").rstrip())
    assert list(c4.documents(path, skip_lines=0)) == ["one", "two"]


def test_blank_lines_without_end_are_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(c4, "MAX_BLANK_LINES", 3, raising=False)
    path = write(tmp_path / "a.json", line("one"), b"\n" * 3, line("two"), b"\n" * 3)
    assert list(c4.documents(path, skip_lines=0)) == ["one", "two"]
    write(path, line("one"), b"\n" * 5)
    with pytest.raises(InputError, match=r"a.json: the 4 lines up to line 5 are blank; this is no text"):
        list(c4.documents(path, skip_lines=9))


def test_shards_of_a_glob_a_folder_and_a_file(tmp_path: Path):
    names = ["c4-train.00001.json.gz", "c4-train.00000.json.gz", "other.jsonl"]
    for name in names:
        write(tmp_path / name, line("x"))
    (tmp_path / "README.md").write_text("not text")
    assert [p.name for p in c4.shards(str(tmp_path / "c4-train.*.json.gz"))] == sorted(names[:2])
    assert [p.name for p in c4.shards(str(tmp_path))] == sorted(names)
    assert [p.name for p in c4.shards(str(tmp_path / names[2]))] == [names[2]]
    assert [p.name for p in c4.shards(f"{tmp_path.parent}/{tmp_path.name[:-1]}?/other.jsonl")] == [names[2]]


def test_pipes_are_ignored(tmp_path: Path):
    os.mkfifo(tmp_path / "a.json")
    (tmp_path / "b.json").write_text("")
    for source in (tmp_path, tmp_path / "*.json"):
        assert [p.name for p in c4.shards(str(source))] == ["b.json"]
    with pytest.raises(InputError, match="matches no file"):
        c4.shards(str(tmp_path / "a.json"))


def test_shards_keep_a_bucket_s_scheme(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(c4, "_matches", lambda path: [path])
    (path,) = c4.shards("gs://bucket/en/c4-train.*.json.gz")
    assert str(path) == "gs://bucket/en/c4-train.*.json.gz"


@pytest.mark.parametrize("source", ["nothing-here", "no-such-*.json.gz", "no/such/folder/*.json"])
def test_a_source_without_files_is_refused(tmp_path: Path, source: str):
    with pytest.raises(InputError, match="matches no file") as error:
        c4.shards(str(tmp_path / source))
    assert source in str(error.value)


def test_an_empty_folder_matches_no_file(tmp_path: Path):
    with pytest.raises(InputError, match="matches no file"):
        c4.shards(str(tmp_path))


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"{not json\n", "line 2 is not JSON"),
        (b"\xff\xfe\xfd\n", "line 2 is not JSON"),
        (b"[" * 100_000 + b"\n", "line 2 is not JSON"),
        (b'["text"]\n', "line 2 has no string `text`"),
        (b'{"content": "x"}\n', "line 2 has no string `text`"),
        (line(17), "line 2 has no string `text`"),
        (line(None), "line 2 has no string `text`"),
        (line("half \ud800 pair"), "line 2 has a `text` with a lone surrogate"),
    ],
)
def test_a_bad_line_is_named_or_skipped(tmp_path: Path, bad: bytes, reason: str):
    path = write(tmp_path / "bad.json.gz", line("one"), bad, line("three"))
    with pytest.raises(InputError, match=r"bad\.json\.gz") as error:
        list(c4.documents(path, skip_lines=0))
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
    assert list(c4.documents(path, skip_lines=1)) == ["one", "three"]


def test_one_bad_line_more_than_allowed(tmp_path: Path):
    path = write(tmp_path / "bad.json", b"x\n", line("one"), b"y\n", b"z\n")
    with pytest.raises(InputError, match="line 4 is not JSON"):
        list(c4.documents(path, skip_lines=2))
    skipped = [record.text is None for record in c4.records(c4.epath.Path(path), skip_lines=3)]
    assert skipped == [True, False, True, True]


@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_a_truncated_gzip(tmp_path: Path, kept: float):
    path = write(tmp_path / "cut.json.gz", *(line(f"text {i}") for i in range(1000)))
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(InputError, match=r"cut\.json\.gz is a truncated gzip file"):
        list(c4.documents(path, skip_lines=1000))


def test_a_corrupt_gzip(tmp_path: Path):
    path = write(tmp_path / "bits.json.gz", *(line(f"text {i}") for i in range(1000)))
    data = bytearray(path.read_bytes())
    data[-6] ^= 1  # in the checksum, so that every line can still be read
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"bits\.json\.gz is not a valid gzip file"):
        list(c4.documents(path, skip_lines=0))


@pytest.mark.parametrize(("data", "reason"), [(b"", "is empty"), (line("plain text"), "not a valid gzip")])
def test_a_gz_file_without_gzip(tmp_path: Path, data: bytes, reason: str):
    path = tmp_path / "a.json.gz"
    path.write_bytes(data)
    with pytest.raises(InputError, match=reason):
        list(c4.documents(path, skip_lines=0))


def test_a_missing_file(tmp_path: Path):
    with pytest.raises(InputError, match=r"gone\.json cannot be read: No such file"):
        list(c4.documents(tmp_path / "gone.json", skip_lines=0))


def test_lines_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(c4, "MAX_LINE_BYTES", 200)
    path = write(tmp_path / "long.json", line("short"), line("x" * 200))
    with pytest.raises(InputError, match="line 2 is longer"):
        list(c4.documents(path, skip_lines=5))


def test_the_last_position_is_the_size(tmp_path: Path):
    write(tmp_path / "a.json.gz", *map(line, TEXTS))
    (shard,) = c4.file_shards(str(tmp_path))
    positions = [record.position for record in shard.records(0)]
    assert positions == sorted(positions)
    assert positions[-1] == shard.size == (tmp_path / "a.json.gz").stat().st_size


def test_the_real_corpus_reads(corpus: Path):
    texts = list(c4.documents(corpus / "c4-real-validation.00000-of-00001.json.gz", skip_lines=0))
    assert len(texts) == 2084
    assert all(texts)
