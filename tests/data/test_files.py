"""Files of text: what is read, and one clear line for each way in which they can be broken."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from backports import zstd
from etils import epath
from pyarrow import parquet

from mora_jax.errors import InputError
from train.data.text import files, jsonl
from train.data.text import parquet as rows

TEXTS = ["First text.", "Zweiter, mit Umlaut: ü", "third\nwith lines"]


def line(text: object) -> bytes:
    return json.dumps({"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "x"}).encode() + b"\n"


PACK = {".gz": gzip.compress, ".zst": zstd.compress}


def write(path: Path, *lines: bytes) -> Path:
    path.write_bytes(PACK.get(path.suffix.lower(), bytes)(b"".join(lines)))
    return path


def write_parquet(path: Path, columns: dict[str, pa.Array | list], **how: Any) -> Path:
    parquet.write_table(pa.table(columns), path, **how)
    return path


@pytest.mark.parametrize(
    "name", ["a.json.gz", "a.jsonl.gz", "a.json", "a.jsonl", "A.JSON.GZ", "a.jsonl.zst", "a.zst"]
)
def test_documents_of_plain_and_packed_files(tmp_path: Path, name: str):
    path = write(tmp_path / name, *map(line, TEXTS))
    assert [shard.path.name for shard in files.file_shards(str(tmp_path))] == [name]
    assert list(files.documents(path, skip_lines=0)) == TEXTS


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_documents_of_parquet_files(tmp_path: Path, kind: pa.DataType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rows, "ROWS_AT_ONCE", 2)
    columns = {"id": list(range(6)), "text": pa.array(TEXTS * 2).cast(kind)}
    path = write_parquet(tmp_path / "A.Parquet", columns, row_group_size=4)
    (shard,) = files.file_shards(str(tmp_path))
    found = list(shard.records(0))
    assert [record.content for record in found] == TEXTS * 2
    positions = [record.position for record in found]
    assert positions == sorted(positions)
    assert positions[-1] == shard.size == path.stat().st_size


def test_the_key_of_the_text_is_chosen(tmp_path: Path):
    lines = write(tmp_path / "a.jsonl", b'{"content": "x", "text": 3}\n')
    column = write_parquet(tmp_path / "a.parquet", {"content": ["x"], "text": [3]})
    for path in (lines, column):
        assert list(files.documents(path, 0, "content")) == ["x"]


def test_a_missing_key_names_those_that_exist(tmp_path: Path):
    there = r"`body` \(it has content, text; --text-key names the one to read\)"
    with pytest.raises(InputError, match=r"a\.jsonl: line 1 has no string " + there):
        list(files.documents(write(tmp_path / "a.jsonl", b'{"content": "x", "text": 3}\n'), 0, "body"))
    path = write_parquet(tmp_path / "a.parquet", {"content": ["x"], "text": [3]})
    with pytest.raises(InputError, match=r"a\.parquet has no column " + there):
        list(files.documents(path, 9, "body"))
    with pytest.raises(InputError, match=r"a\.parquet: its column `text` holds int64, not strings"):
        list(files.documents(path, 9))


def test_a_bad_row_is_named_or_skipped(tmp_path: Path):
    latin = pa.array([b"one", None, b"\xfc", b"four"], pa.binary()).view(pa.string())
    path = write_parquet(tmp_path / "a.parquet", {"text": latin})
    with pytest.raises(
        InputError, match=r"a\.parquet: row 2 has no string `text`; fix it, or .*--skip-lines"
    ):
        list(files.documents(path, 0))
    with pytest.raises(InputError, match=r"a\.parquet: row 3 has a `text` that is not UTF-8"):
        list(files.documents(path, 1))
    assert list(files.documents(path, 2)) == ["one", "four"]


@pytest.mark.parametrize("kept", [0, 0.5, 0.99])
def test_a_damaged_parquet_file(tmp_path: Path, kept: float):
    path = write_parquet(tmp_path / "a.parquet", {"text": [f"text {i}" for i in range(1000)]})
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(InputError, match=r"a\.parquet is not a valid Parquet file \(.*download it again"):
        list(files.documents(path, 0))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz", "a.zst", "a.parquet"])
def test_a_git_lfs_pointer(tmp_path: Path, name: str):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(InputError, match=f"{name} is a Git LFS pointer: run git lfs pull"):
        list(files.documents(tmp_path / name, 99))


def test_blank_lines_and_a_missing_last_newline_lose_nothing(tmp_path: Path):
    path = write(tmp_path / "a.json", line("one"), b"\n", b"  \n", line("two").rstrip())
    assert list(files.documents(path, skip_lines=0)) == ["one", "two"]


def test_blank_lines_without_end_are_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(jsonl, "MAX_BLANK_LINES", 3)
    path = write(tmp_path / "a.json", line("one"), b"\n" * 3, line("two"), b"\n" * 3)
    assert list(files.documents(path, skip_lines=0)) == ["one", "two"]
    write(path, line("one"), b"\n" * 5)
    with pytest.raises(InputError, match=r"a.json: the 4 lines up to line 5 are blank; this is no text"):
        list(files.documents(path, skip_lines=9))


def test_shards_of_a_glob_a_folder_and_a_file(tmp_path: Path):
    names = ["c4-train.00001.json.gz", "c4-train.00000.json.gz", "other.jsonl"]
    for name in names:
        write(tmp_path / name, line("x"))
    (tmp_path / "README.md").write_text("not text")
    assert [p.name for p in files.shards(str(tmp_path / "c4-train.*.json.gz"))] == sorted(names[:2])
    assert [p.name for p in files.shards(str(tmp_path))] == sorted(names)
    assert [p.name for p in files.shards(str(tmp_path / names[2]))] == [names[2]]
    assert [p.name for p in files.shards(f"{tmp_path.parent}/{tmp_path.name[:-1]}?/other.jsonl")] == [
        names[2]
    ]


def test_pipes_are_ignored(tmp_path: Path):
    os.mkfifo(tmp_path / "a.json")
    (tmp_path / "b.json").write_text("")
    for source in (tmp_path, tmp_path / "*.json"):
        assert [p.name for p in files.shards(str(source))] == ["b.json"]
    with pytest.raises(InputError, match="matches no file"):
        files.shards(str(tmp_path / "a.json"))


def test_shards_keep_a_bucket_s_scheme(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "_matches", lambda path: [path])
    (path,) = files.shards("gs://bucket/en/c4-train.*.json.gz")
    assert str(path) == "gs://bucket/en/c4-train.*.json.gz"


@pytest.mark.parametrize("source", ["nothing-here", "no-such-*.json.gz", "no/such/folder/*.json"])
def test_a_source_without_files_is_refused(tmp_path: Path, source: str):
    with pytest.raises(InputError, match="matches no file") as error:
        files.shards(str(tmp_path / source))
    assert source in str(error.value)


def test_an_empty_folder_matches_no_file(tmp_path: Path):
    with pytest.raises(InputError, match="matches no file"):
        files.shards(str(tmp_path))


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
        list(files.documents(path, skip_lines=0))
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
    assert list(files.documents(path, skip_lines=1)) == ["one", "three"]


def test_one_bad_line_more_than_allowed(tmp_path: Path):
    path = write(tmp_path / "bad.json", b"x\n", line("one"), b"y\n", b"z\n")
    with pytest.raises(InputError, match="line 4 is not JSON"):
        list(files.documents(path, skip_lines=2))
    skipped = [record.content is None for record in files.records(epath.Path(path), skip_lines=3)]
    assert skipped == [True, False, True, True]


@pytest.mark.parametrize("kept", [0.3, 0.9])
@pytest.mark.parametrize(("suffix", "kind"), [("gz", "gzip"), ("zst", "Zstandard")])
def test_a_truncated_file(tmp_path: Path, kept: float, suffix: str, kind: str):
    path = write(tmp_path / f"cut.json.{suffix}", *(line(f"text {i}") for i in range(1000)))
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(InputError, match=rf"cut\.json\.{suffix} is a truncated {kind} file"):
        list(files.documents(path, skip_lines=1000))


def test_a_corrupt_gzip(tmp_path: Path):
    path = write(tmp_path / "bits.json.gz", *(line(f"text {i}") for i in range(1000)))
    data = bytearray(path.read_bytes())
    data[-6] ^= 1  # in the checksum, so that every line can still be read
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"bits\.json\.gz is not a valid gzip file"):
        list(files.documents(path, skip_lines=0))


@pytest.mark.parametrize(
    ("data", "reason"), [(b"", "is empty"), (line("plain text"), "not a valid (gzip|Zst)")]
)
@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_packed_file_that_is_none(tmp_path: Path, data: bytes, reason: str, suffix: str):
    path = tmp_path / f"a.json.{suffix}"
    path.write_bytes(data)
    with pytest.raises(InputError, match=reason):
        list(files.documents(path, skip_lines=0))


def test_a_missing_file(tmp_path: Path):
    with pytest.raises(InputError, match=r"gone\.json cannot be read: No such file"):
        list(files.documents(tmp_path / "gone.json", skip_lines=0))


def test_lines_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jsonl, "MAX_BYTES", 200)
    path = write(tmp_path / "long.json", line("short"), line("x" * 200))
    with pytest.raises(InputError, match="line 2 is longer"):
        list(files.documents(path, skip_lines=5))


def test_the_last_position_is_the_size(tmp_path: Path):
    write(tmp_path / "a.json.gz", *map(line, TEXTS))
    (shard,) = files.file_shards(str(tmp_path))
    positions = [record.position for record in shard.records(0)]
    assert positions == sorted(positions)
    assert positions[-1] == shard.size == (tmp_path / "a.json.gz").stat().st_size


def test_the_real_corpus_reads(corpus: Path):
    texts = list(files.documents(corpus / "c4-real-validation.00000-of-00001.json.gz", skip_lines=0))
    assert len(texts) == 2084
    assert all(texts)


@pytest.mark.parametrize(
    ("name", "indent", "encoding"),
    [("a.json", None, "utf-8"), ("a.json", 2, "utf-8-sig"), ("a.json.gz", None, "utf-8-sig")],
)
def test_an_array_of_objects(
    tmp_path: Path, name: str, indent: int | None, encoding: str, monkeypatch: pytest.MonkeyPatch
):
    """As many data sets are published; a part is in memory at a time, wherever it is cut."""
    rows = [{"text": f"{text} [{i}], {{}}", "other": [{"a": i}]} for i, text in enumerate(TEXTS * 9)]
    path = write(tmp_path / name, json.dumps(rows, indent=indent, ensure_ascii=False).encode(encoding))
    monkeypatch.setattr(jsonl, "MAX_BYTES", 200)
    for chunk in (1, 7, 1 << 20):
        monkeypatch.setattr(jsonl, "_CHUNK", chunk)
        assert list(files.documents(path, 0)) == [row["text"] for row in rows]


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        (b'[{"text": "a"}, {"text": 3}]', "element 2 has no string `text`"),
        (b'[{"text": "a"}, {"text": "b"', "element 2 of its array is not JSON"),
        (b'[{"text": "a"} "b"} ]', "element 2 has no string `text`"),
        (b'[{"text": "a"}] {"text": "b"}', "element 2 of its array is not JSON"),
        (b'[{"text": "a"}', "element 2 of its array is not JSON"),
        (b'[{"text": "\xff"}]', "is not UTF-8 text"),
        (b'["a"]', "line 1 has no string `text`"),
        (b"[]", "line 1 has no string `text`"),
    ],
)
def test_a_bad_array(tmp_path: Path, content: bytes, wrong: str):
    with pytest.raises(InputError, match=wrong):
        list(files.documents(write(tmp_path / "a.json", content), 0))
