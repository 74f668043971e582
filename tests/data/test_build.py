"""Preparation: exact rows, any number of workers, restarts, and every refusal."""

import errno
import fcntl
import gzip
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath
from sentencepiece import sentencepiece_model_pb2

from mora_jax.errors import InputError
from train.data.rows import build, layout, shard, workers
from train.data.rows.build import prepare
from train.data.rows.info import load_info
from train.data.tokenizer import Tokenizer, train_tokenizer
from train.storage import buckets, lock

T = 48
SHARDS = 4


def texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 7))) for _ in range(200)]
    return [" ".join(rng.choices(words, k=rng.randint(1, 60))) for _ in range(count)]


def write(path: Path, documents: list[str]) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    path.write_bytes(gzip.compress(lines.encode()))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four training files (one with a single short document), a validation file, a tokenizer."""
    folder = tmp_path_factory.mktemp("text")
    for index in range(SHARDS):
        write(folder / f"train.{index}.json.gz", texts(1 if index == 2 else 60, seed=index))
    (folder / "train.2.json.gz").unlink()
    write(folder / "train.2.json.gz", ["short"])
    write(folder / "validation.json.gz", texts(30, seed=9))
    train_tokenizer(str(folder / "train.*"), str(folder / "t.model"), 400)
    return folder


def prepared(text: Path, out: Path | str, **changes) -> build.DataInfo:
    arguments = {
        "source": str(text / "train.*.json.gz"),
        "validation": str(text / "validation.json.gz"),
        "tokenizer": str(text / "t.model"),
        "sequence_length": T,
        "out": str(out),
        "workers": 1,
    }
    return prepare(**(arguments | changes))


def rows(out: Path, split: str) -> list[list[int]]:
    return [row["tokens"].tolist() for row in tfds.builder_from_directory(out).as_data_source(split)]


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def documents(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in gzip.decompress(path.read_bytes()).splitlines()]


def expected_rows(files: list[Path], tokenizer: Tokenizer) -> list[list[int]]:
    """Written without the code under test: EOS after every document, whole rows of every file."""
    result = []
    for file in files:
        stream = [
            t for d in documents(file) for t in [*tokenizer.processor.encode(d), tokenizer.processor.eos_id()]
        ]
        result += [stream[i : i + T] for i in range(0, len(stream) - T + 1, T)]
    return result


def test_rows_are_the_documents_joined_with_eos(text: Path, tmp_path: Path):
    info = prepared(text, tmp_path / "d")
    tokenizer = Tokenizer.load(text / "t.model")
    files = sorted(text.glob("train.*.gz"))
    assert rows(tmp_path / "d", "train") == expected_rows(files, tokenizer)
    assert rows(tmp_path / "d", "validation") == expected_rows([text / "validation.json.gz"], tokenizer)
    assert info.rows["train"] == len(expected_rows(files, tokenizer)) > 100


def test_only_the_last_partial_row_of_a_shard_is_dropped(text: Path, tmp_path: Path):
    prepared(text, tmp_path / "d")
    tokenizer = Tokenizer.load(text / "t.model")
    counts = tfds.builder_from_directory(tmp_path / "d").info.metadata["splits"]["train"]
    lengths = [
        sum(len(tokenizer.processor.encode(d)) + 1 for d in documents(path))
        for path in sorted(text.glob("train.*.gz"))
    ]
    assert counts["tokens"] + counts["dropped_tokens"] == sum(lengths)
    assert counts["dropped_tokens"] == sum(length % T for length in lengths)
    assert counts["documents"] == 60 * 3 + 1


def test_blocks_make_no_difference(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    prepared(text, tmp_path / "one")
    monkeypatch.setattr(shard, "BLOCK_RECORDS", 7)
    prepared(text, tmp_path / "many")
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


def test_workers_make_no_difference(text: Path, tmp_path: Path):
    prepared(text, tmp_path / "one", workers=1)
    prepared(text, tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_metadata_and_stored_type(text: Path, tmp_path: Path):
    info = prepared(text, tmp_path / "d")
    tokenizer = Tokenizer.load(text / "t.model")
    described = tfds.builder_from_directory(tmp_path / "d").info
    assert described.metadata["tokenizer_sha256"] == tokenizer.sha256 == info.tokenizer_sha256
    assert (described.metadata["sequence_length"], described.metadata["vocab_size"]) == (T, 400)
    assert described.metadata["eos_id"] == info.eos_id == tokenizer.eos_id
    assert described.splits["train"].num_examples == info.rows["train"]
    assert described.features["tokens"].np_dtype == np.uint16
    assert (tmp_path / "d" / "tokenizer.model").read_bytes() == (text / "t.model").read_bytes()
    assert not (tmp_path / "d" / "unfinished").exists()


def test_a_large_vocabulary_is_stored_as_uint32(text: Path, tmp_path: Path):
    model = sentencepiece_model_pb2.ModelProto.FromString((text / "t.model").read_bytes())
    for index in range(70_000):
        piece = model.pieces.add(piece=f"Q{index}Q", score=0)
        piece.type = sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED
    (tmp_path / "large.model").write_bytes(model.SerializeToString())
    write(tmp_path / "train.json.gz", [f"Q{i}Q" for i in range(69_000, 70_000)])
    info = prepared(
        text,
        tmp_path / "d",
        source=str(tmp_path / "train.json.gz"),
        tokenizer=str(tmp_path / "large.model"),
    )
    stored = np.array(rows(tmp_path / "d", "train"))
    assert info.vocab_size == 70_400
    assert tfds.builder_from_directory(tmp_path / "d").info.features["tokens"].np_dtype == np.uint32
    assert stored.max() > 70_000
    assert set(range(69_400, 70_000)) <= set(stored.ravel().tolist())


def interrupted_after(count: int):
    """A `write_shard` that stops the program when `count` shards are done."""
    calls = itertools.count()

    def write_some(job: shard.Job, report) -> None:
        if next(calls) == count:
            raise KeyboardInterrupt
        shard.write_shard(job, report)

    return write_some


def test_a_restart_does_only_what_is_left(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "d"
    with monkeypatch.context() as patch:
        patch.setattr(workers, "write_shard", interrupted_after(2))
        with pytest.raises(KeyboardInterrupt):
            prepared(text, out)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("rows-*")}
    assert len(before) == 2
    done = []
    monkeypatch.setattr(workers, "write_shard", lambda job, _: (done.append(job), shard.write_shard(job, _)))
    prepared(text, out)
    assert len(done) == SHARDS + 1 - 2
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in out.glob("rows-*")}.items()
    prepared(text, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_preparing_again_has_nothing_to_do(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = prepared(text, tmp_path / "d")
    monkeypatch.setattr(workers, "write_shard", None)
    assert prepared(text, tmp_path / "d") == first


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_kill_in_mid_shard_leaves_no_half_row_file(text: Path, tmp_path: Path):
    for index in range(3):
        write(tmp_path / f"train.{index}.json.gz", texts(4_000 if index else 50, seed=index))
    out = tmp_path / "d"
    call = (
        "from train.data.rows.build import prepare\n"
        "if __name__ == '__main__':\n"
        f"    prepare({str(tmp_path / 'train.*')!r}, {str(text / 'validation.json.gz')!r}, "
        f"{str(text / 't.model')!r}, {T}, {str(out)!r}, workers=2)\n"
    )
    (tmp_path / "call.py").write_text(call)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, tmp_path / "call.py"], env=environment)
    try:
        deadline = time.monotonic() + 60
        while not list(out.glob("unfinished/*.json")) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(children) >= 3  # the workers and the manager of their messages
    while any(Path("/proc", child).exists() for child in children):
        assert time.monotonic() < deadline, "a worker outlives the program"
        time.sleep(0.05)
    assert not (out / "dataset_info.json").exists()
    arguments = {"source": str(tmp_path / "train.*"), "workers": 1}
    assert prepared(text, out, **arguments) == prepared(text, out, **arguments)
    prepared(text, tmp_path / "whole", **arguments)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sequence_length": T + 1}, f"another sequence_length ({T}, now {T + 1})"),
        ({"source": "train.[01].json.gz"}, "another train (4 shards of text, now 2 shards of text)"),
        ({"tokenizer": "other.model"}, "another tokenizer_sha256"),
    ],
)
def test_other_settings_are_refused(text: Path, tmp_path: Path, change: dict, named: str):
    prepared(text, tmp_path / "d")
    before = contents(tmp_path / "d")
    train_tokenizer(str(text / "train.*.gz"), str(text / "other.model"), 390)
    change = {name: str(text / value) if isinstance(value, str) else value for name, value in change.items()}
    with pytest.raises(InputError, match="was prepared with") as error:
        prepared(text, tmp_path / "d", **change)
    assert named in str(error.value)
    assert contents(tmp_path / "d") == before


def test_a_folder_of_something_else_is_refused(text: Path, tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="is not empty and not a prepared data set"):
        prepared(text, tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_store_that_is_not_known(text: Path):
    with pytest.raises(InputError, match="--out http://host/data must be a folder, or one in a bucket"):
        prepared(text, "http://host/data")


def test_a_file_is_no_place_for_rows(text: Path, tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        prepared(text, tmp_path / "file" / "d")


@pytest.mark.parametrize(("name", "value"), [("sequence_length", 1), ("skip_lines", -1), ("workers", -1)])
def test_numbers_out_of_range(text: Path, tmp_path: Path, name: str, value: int):
    with pytest.raises(InputError, match=f"--{name.replace('_', '-')} must be at least"):
        prepared(text, tmp_path / "d", **{name: value})


def test_validation_text_must_be_given_and_be_other_text(text: Path, tmp_path: Path):
    with pytest.raises(InputError, match="--validation is missing"):
        prepared(text, tmp_path / "d", validation="")
    with pytest.raises(InputError, match=r"train\.1\.json\.gz is in the training and the validation text"):
        prepared(text, tmp_path / "d", validation=str(text / "train.1.json.gz"))
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("count", [1, 2])
def test_a_bad_file_keeps_the_finished_shards(text: Path, tmp_path: Path, count: int):
    write(tmp_path / "0.json.gz", texts(50, seed=0))
    write(tmp_path / "1.json.gz", texts(50, seed=1))
    whole = (tmp_path / "1.json.gz").read_bytes()
    (tmp_path / "1.json.gz").write_bytes(whole[:-20])
    source = str(tmp_path / "*.json.gz")
    with pytest.raises(InputError, match=r"1\.json\.gz is a truncated gzip file"):
        prepared(text, tmp_path / "d", source=source, workers=count)
    assert not list((tmp_path / "d").glob("rows-train*00001-of*"))
    assert not list((tmp_path / "d" / "unfinished").glob("*rows-*"))


def test_bad_lines_are_skipped_and_counted_over_all_files(text: Path, tmp_path: Path):
    for index in range(2):
        write(tmp_path / f"{index}.json.gz", texts(50, seed=index))
        good = gzip.decompress((tmp_path / f"{index}.json.gz").read_bytes())
        (tmp_path / f"{index}.json.gz").write_bytes(gzip.compress(b"not JSON\n" + good))
    source = str(tmp_path / "*.json.gz")
    with pytest.raises(InputError, match="line 1 is not JSON"):
        prepared(text, tmp_path / "d", source=source)
    with pytest.raises(InputError, match="2 bad lines, and --skip-lines 1 allows 1"):
        prepared(text, tmp_path / "d", source=source, skip_lines=1)
    prepared(text, tmp_path / "d", source=source, skip_lines=2)
    counts = tfds.builder_from_directory(tmp_path / "d").info.metadata["splits"]
    assert (counts["train"]["skipped_lines"], counts["validation"]["skipped_lines"]) == (2, 0)
    assert counts["train"]["documents"] == 100


def test_an_empty_corpus(text: Path, tmp_path: Path):
    write(tmp_path / "empty.json.gz", [])
    with pytest.raises(InputError, match=r"the train text \(empty\.json\.gz, \.\.\.\) holds no document"):
        prepared(text, tmp_path / "d", source=str(tmp_path / "empty.json.gz"))


def test_less_text_than_a_row(text: Path, tmp_path: Path):
    write(tmp_path / "small.json.gz", ["few words"])
    with pytest.raises(InputError, match=f"the validation text has .* fewer than a row of {T}"):
        prepared(text, tmp_path / "d", validation=str(tmp_path / "small.json.gz"))


def test_real_text_with_a_real_tokenizer(corpus: Path, tokenizers: Path, tmp_path: Path):
    lines = gzip.decompress((corpus / "c4-validation.00000-of-00001.json.gz").read_bytes()).splitlines()[:60]
    for name, part in (("train", lines[:40]), ("validation", lines[40:])):
        (tmp_path / f"{name}.jsonl").write_bytes(b"\n".join(part))
    model = tokenizers / "mistral_v1_32k.model"
    info = prepare(
        str(tmp_path / "train.jsonl"),
        str(tmp_path / "validation.jsonl"),
        str(model),
        128,
        str(tmp_path / "d"),
    )
    processor = Tokenizer.load(model).processor
    stream = [t for line in lines[:40] for t in [*processor.encode(json.loads(line)["text"]), 2]]
    assert list(itertools.chain(*rows(tmp_path / "d", "train"))) == stream[: len(stream) // 128 * 128]
    assert info.tokens["train"] == len(stream) // 128 * 128


def test_a_kill_while_the_description_is_written(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """TFDS writes it in place: a kill, or a full disk, leaves half a file."""
    out, real = tmp_path / "d", type(epath.Path()).write_text

    def cut_off(self: Any, content: str, *args: Any, **kwargs: Any) -> int:
        if self.name != layout.DESCRIBED:
            return real(self, content, *args, **kwargs)
        real(self, content[: len(content) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(epath.Path()), "write_text", cut_off)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                prepared(text, out)
    with pytest.raises(InputError, match="is not finished; run the same preparation again"):
        load_info(str(out))
    monkeypatch.setattr(workers, "write_shard", None)  # no shard is done again
    prepared(text, out)
    monkeypatch.undo()
    prepared(text, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("moves", range(5))  # the last: when all of them are
def test_a_kill_while_the_last_files_are_put_in_place(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
):
    out, real, left = tmp_path / "d", Path.replace, iter(range(moves))

    def replace(self: Path, target: Path) -> Path:
        if self.parent.name == "description" and next(left, None) is None:
            raise KeyboardInterrupt
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        patch.setattr(shutil, "rmtree", stopping_at(out / layout.UNFINISHED))
        with pytest.raises(KeyboardInterrupt):
            prepared(text, out)
    monkeypatch.setattr(workers, "write_shard", None)
    prepared(text, out)
    monkeypatch.undo()
    prepared(text, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def stopped(*args: Any) -> None:
    raise KeyboardInterrupt


def stopping_at(folder: Path):
    """A `shutil.rmtree` that stops the program before that folder goes."""
    real = shutil.rmtree

    def rmtree(path: Path, **kwargs: Any) -> None:
        if path == folder:
            raise KeyboardInterrupt
        real(path, **kwargs)

    return rmtree


def npy(shape: str, descr: str = "<i8") -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("unfinished/train-00001.npy", npy("(10000000000000,)")),
        ("unfinished/train-00001.npy", b""),
        ("unfinished/train-00001.npy", None),
        ("unfinished/train-00001.json", b'{"rows": "x"}'),
        ("unfinished/train-00001.json", b'{"rows": 7, "file_bytes": -1}'),
        ("unfinished/train-00001.json", b'{"lines": 7}'),
        ("unfinished/train-00001.json", b"[1]"),
        (f"rows-train.array_record-00001-of-0000{SHARDS}", b"cut off"),
        (f"rows-train.array_record-00001-of-0000{SHARDS}", None),
    ],
)
def test_a_damaged_piece_is_done_again(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes | None
):
    out, done = tmp_path / "d", []
    with monkeypatch.context() as patch:
        patch.setattr(build, "write_metadata", stopped)
        with pytest.raises(KeyboardInterrupt):
            prepared(text, out)
    (out / name).unlink()
    if content is not None:
        (out / name).write_bytes(content)
    monkeypatch.setattr(workers, "write_shard", lambda job, _: (done.append(job), shard.write_shard(job, _)))
    prepared(text, out)
    assert [job.record.name for job in done] == ["train-00001.json"]
    prepared(text, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


HOLD = """
import sys, time
from pathlib import Path
from train.storage import lock
with lock.held(Path(sys.argv[1]), "out", ""):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_two_programs_at_once(text: Path, tmp_path: Path, bucket: str, place: str):
    out = str(tmp_path / "d") if place == "disk" else f"{bucket}/d"
    folder = buckets.stand_in("prepare", out) if place == "bucket" else Path(out)
    words = [sys.executable, "-W", "ignore", "-c", HOLD, folder / layout.UNFINISHED / lock.LOCK]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=rf"{out} is in use by process {other.pid} .* another --out"):
            prepared(text, out)
        assert [entry.name for entry in folder.iterdir()] == [layout.UNFINISHED]
        other.kill()
    prepared(text, out)
    assert not (folder / layout.UNFINISHED).exists()


def test_another_program_finished_it_meanwhile(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = lock.held

    def late(*args: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(lock, "held", real)
            prepared(text, tmp_path / "d")
        return real(*args)

    monkeypatch.setattr(lock, "held", late)
    done = []
    monkeypatch.setattr(workers, "write_shard", lambda job, _: (done.append(job), shard.write_shard(job, _)))
    prepared(text, tmp_path / "d")
    assert len(done) == SHARDS + 1
    assert not (tmp_path / "d" / layout.UNFINISHED).exists()


def test_a_finished_data_set_needs_no_lock(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It may be where nothing can be written."""
    first = prepared(text, tmp_path / "d")
    monkeypatch.setattr(lock, "held", None)
    assert prepared(text, tmp_path / "d") == first


def test_a_disk_without_locks_is_warned_of(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
):
    def none(*args: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", none)
    prepared(text, tmp_path / "d")
    assert f"warning: {tmp_path / 'd'} cannot be locked: No locks available" in capfd.readouterr().err


def test_a_disk_that_is_full_at_the_end(text: Path, disk, monkeypatch: pytest.MonkeyPatch):
    out, real = disk.path / "d", build.write_metadata
    with monkeypatch.context() as patch:
        patch.setattr(build, "write_metadata", lambda *args: (disk.fill(), real(*args)))
        with pytest.raises(OSError, match=r"No space left .*unfinished/description"):
            prepared(text, out)
    disk.free()
    monkeypatch.setattr(workers, "write_shard", None)
    prepared(text, out)
