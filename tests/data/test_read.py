"""Reading rows: batches depend on the step alone, processes share them, damaged data sets are refused."""

import itertools
import json
import math
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from google.protobuf.json_format import ParseError
from made_text import npy, random_texts, write_lines
from slow import slow

from mora_jax.errors import InputError
from train.data.rows.build import prepare
from train.data.rows.info import DataInfo, load_info, unigram_perplexity
from train.data.rows.read import eval_batches, rows_from, train_batches
from train.data.tokenizer import train_tokenizer

T = 32
B = 6


@pytest.fixture(scope="module")
def info(tmp_path_factory: pytest.TempPathFactory) -> DataInfo:
    """A data set of 72 documents; neither split is a multiple of the batch sizes below."""
    folder = tmp_path_factory.mktemp("read")
    for name, count in (("train.0", 40), ("train.1", 20), ("validation", 12)):
        write_lines(folder / f"{name}.jsonl", random_texts(count, seed=count))
    train_tokenizer(str(folder / "train.*"), str(folder / "t.model"), 400)
    return prepare(
        str(folder / "train.*.jsonl"),
        str(folder / "validation.jsonl"),
        str(folder / "t.model"),
        T,
        str(folder / "data"),
        workers=1,
    )


@pytest.fixture
def copied(tiny_data: Path, tmp_path: Path) -> Path:
    """A copy of the tiny data set, to be damaged."""
    return Path(shutil.copytree(tiny_data, tmp_path / "data"))


def edit(path: Path, **changes) -> None:
    """Changes values of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def stored(info: DataInfo, split: str) -> np.ndarray:
    """Returns all rows of a split, read without the code under test."""
    source = tfds.builder_from_directory(info.directory).as_data_source(split)
    return np.stack([row["tokens"] for row in source])


def take(batches, count: int) -> np.ndarray:
    return np.stack([batch.tokens_BT for batch in itertools.islice(batches, count)])


def test_batches_have_one_shape_and_type(info: DataInfo):
    batch = next(train_batches(info, B, seed=0, start_step=0)).tokens_BT
    assert (batch.shape, batch.dtype) == ((B, T), np.int32)


def test_every_epoch_has_every_row_once_in_another_order(info: DataInfo):
    rows = stored(info, "train")
    count = len(rows)
    assert len(np.unique(rows, axis=0)) == count
    read = take(train_batches(info, 1, seed=0, start_step=0), 2 * count)[:, 0]
    first, second = read[:count], read[count:]
    for epoch in (first, second):
        assert sorted(map(tuple, epoch)) == sorted(map(tuple, rows))
    assert not np.array_equal(first, rows)
    assert not np.array_equal(first, second)


@pytest.mark.slow  # test_rows_can_be_skipped goes into the next one
def test_batches_span_the_end_of_an_epoch(info: DataInfo):
    single = take(train_batches(info, 1, seed=0, start_step=0), 4 * B * (info.rows["train"] // B))[:, 0]
    assert info.rows["train"] % B
    batches = take(train_batches(info, B, seed=0, start_step=0), 4 * (info.rows["train"] // B))
    np.testing.assert_array_equal(batches.reshape(-1, T), single)


def test_the_seed_decides_the_order(info: DataInfo):
    a, b, c = (take(train_batches(info, B, seed=seed, start_step=0), 5) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)


@pytest.mark.parametrize("start", [1, 7, slow(200)])
def test_a_batch_depends_on_the_step_alone(info: DataInfo, start: int):
    whole = take(train_batches(info, B, seed=3, start_step=0), start + 4)
    resumed = take(train_batches(info, B, seed=3, start_step=start), 4)
    np.testing.assert_array_equal(resumed, whole[start:])


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_global_batch(info: DataInfo, processes: int):
    whole = take(train_batches(info, B, seed=3, start_step=5), 30)
    parts = [take(train_batches(info, B, 3, 5, np.arange(p, B, processes)), 30) for p in range(processes)]
    assert parts[0].shape == (30, B // processes, T)
    for p, part in enumerate(parts):
        np.testing.assert_array_equal(part, whole[:, p::processes])


def test_evaluation_reads_every_row_once_in_order(info: DataInfo):
    rows = stored(info, "validation")
    assert len(rows) % 5
    batches = list(eval_batches(info, "validation", 5, None))
    assert len(batches) == math.ceil(len(rows) / 5)
    both = [(batch.tokens_BT, batch.weights_BT) for batch in batches]
    assert {(r.shape, r.dtype, w.shape, w.dtype) for r, w in both} == {
        ((5, T), np.dtype(np.int32), (5, T), np.dtype(np.float32))
    }
    read = np.concatenate([r[w[:, 0] == 1] for r, w in both])
    np.testing.assert_array_equal(read, rows)
    assert sum(w.sum() for _, w in both) == rows.size


def test_evaluation_stops_after_max_batches(info: DataInfo):
    batches = list(eval_batches(info, "validation", 5, 2))
    np.testing.assert_array_equal(
        np.concatenate([batch.tokens_BT for batch in batches]), stored(info, "validation")[:10]
    )


def test_evaluation_of_a_batch_larger_than_the_split(info: DataInfo):
    size = 2 * info.rows["validation"]
    (batch,) = eval_batches(info, "validation", size, None)
    assert batch.tokens_BT.shape == (size, T)
    assert batch.weights_BT.sum() == info.rows["validation"] * T


def test_processes_share_the_evaluation(info: DataInfo):
    whole = list(eval_batches(info, "validation", B, None))
    parts = [list(eval_batches(info, "validation", B, None, np.arange(p, B, 3))) for p in range(3)]
    assert {len(part) for part in parts} == {len(whole)}
    for p, part in enumerate(parts):
        for some, every in zip(part, whole, strict=True):
            np.testing.assert_array_equal(some.tokens_BT, every.tokens_BT[p::3])
            np.testing.assert_array_equal(some.weights_BT, every.weights_BT[p::3])


def test_unigram_perplexity_is_that_of_the_counted_tokens(info: DataInfo):
    counts = np.ones(info.vocab_size)
    for token in stored(info, "train").ravel():
        counts[token] += 1
    p = counts / counts.sum()
    expected = math.exp(-np.mean([math.log(p[token]) for token in stored(info, "validation").ravel()]))
    assert unigram_perplexity(info) == pytest.approx(expected, rel=1e-9)


def test_info_states_what_was_prepared(info: DataInfo):
    again = load_info(info.directory)
    assert again == info
    assert info.rows == {split: len(stored(info, split)) for split in ("train", "validation")}
    assert info.tokens == {split: T * count for split, count in info.rows.items()}


def test_fewer_rows_than_a_batch(info: DataInfo):
    with pytest.raises(InputError, match=f"{info.rows['train']} training rows, fewer than one batch"):
        train_batches(info, info.rows["train"] + 1, seed=0, start_step=0)


def test_a_missing_split(info: DataInfo):
    with pytest.raises(InputError, match="no split 'test'; it has train, validation"):
        eval_batches(info, "test", 1, None)


@pytest.mark.parametrize("name", ["missing", "file"])
def test_a_folder_without_a_data_set(tmp_path: Path, name: str):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=f"{name} is not a data set made by prepare-data"):
        load_info(str(tmp_path / name))


def test_a_foreign_description(tmp_path: Path):
    for text in ("not JSON", "[]", '{"splits": {}}', '{"splits": {"train": {"rows": 1}}}'):
        (tmp_path / "metadata.json").write_text(text)
        with pytest.raises(InputError, match="is not a data set"):
            load_info(str(tmp_path))


def test_an_unfinished_data_set(tmp_path: Path):
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(InputError, match="is not finished; run the same preparation again"):
        load_info(str(tmp_path))


def test_another_tokenizer(copied: Path):
    model = copied / "tokenizer" / "tokenizer.model"
    model.write_bytes(model.read_bytes() + b"\0")
    with pytest.raises(InputError, match="is not the tokenizer that the rows were made with"):
        load_info(str(copied))
    model.unlink()
    with pytest.raises(InputError, match="is not the tokenizer"):
        load_info(str(copied))


def test_lost_rows(copied: Path):
    next(copied.glob("rows-train.array_record-00001*")).unlink()
    with pytest.raises(InputError, match=r"the train rows take .* bytes, not"):
        load_info(str(copied))


def test_a_description_of_rows_of_another_shape(copied: Path):
    """With a type of half the size TFDS finds twice the tokens in a row, or none."""
    text = (copied / "features.json").read_text()
    assert '"32"' in text
    (copied / "features.json").write_text(text.replace("uint16", "uint8").replace('"32"', '"64"'))
    with pytest.raises(InputError, match="not every row has 32 tokens"):
        next(train_batches(load_info(str(copied)), B, 0, 0))


@pytest.mark.parametrize("name", ["rows-train.array_record-00000-of-00002", "rows-x"])
def test_a_pipe_is_not_waited_for(copied: Path, name: str):
    """Neither in the place of rows, with sizes to match, nor as a file that a description may name."""
    path, facts = copied / name, json.loads((copied / "metadata.json").read_text())
    facts["splits"]["train"]["file_bytes"] -= path.stat().st_size if path.exists() else 0
    edit(copied / "metadata.json", **facts)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(InputError, match=f"{name} is not a regular file"):
        load_info(str(copied))


def test_rows_may_be_links(copied: Path, tmp_path: Path):
    path = next(copied.glob("rows-train.*"))
    path.rename(tmp_path / "rows")
    path.symlink_to(tmp_path / "rows")
    assert load_info(str(copied)).rows["train"] > 0
    (tmp_path / "rows").unlink()
    with pytest.raises(InputError, match="is not a regular file"):
        load_info(str(copied))


def test_a_description_cannot_name_code(copied: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """TFDS would import the module of whatever class is named."""
    (tmp_path / "not_to_be_imported.py").write_text("raise SystemExit('code of a data set was run')")
    monkeypatch.syspath_prepend(str(tmp_path))
    text = (copied / "features.json").read_text()
    for name in ("not_to_be_imported.Tensor", "tensorflow_datasets.core.features.x/../y.Z", "os.path"):
        (copied / "features.json").write_text(
            text.replace("tensorflow_datasets.core.features.tensor_feature.Tensor", name)
        )
        with pytest.raises(InputError, match="which is not a feature of TFDS"):
            load_info(str(copied))


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "../other/rows"},
        {"splits": [{"name": "train", "filepathTemplate": "../{DATASET}-{SPLIT}"}]},
        {"splits": [{"name": "..", "shardLengths": ["1"]}]},
    ],
)
def test_a_description_cannot_name_files_elsewhere(copied: Path, changes: dict):
    edit(copied / "dataset_info.json", **changes)
    with pytest.raises(InputError, match="which is not a file of this folder"):
        load_info(str(copied))


@pytest.mark.parametrize(
    "changes",
    [
        {"sequence_length": "32"},
        {"sequence_length": 10**30},
        {"vocab_size": -1},
        {"vocab_size": 2**40},
        {"eos_id": 1e400},
        {"tokenizer_sha256": None},
        {"directory": "/etc"},
        {"tokenizer": "/etc/passwd"},
        {"splits": {"train": {"rows": 10**15, "tokens": 1, "file_bytes": 262144}}},
        {"splits": [1, 2]},
    ],
)
def test_impossible_facts(copied: Path, changes: dict):
    edit(copied / "metadata.json", **changes)
    with pytest.raises(InputError, match="is not a data set made by prepare-data"):
        load_info(str(copied))


def test_more_rows_than_bytes(copied: Path):
    facts = json.loads((copied / "metadata.json").read_text())
    facts["splits"]["train"]["rows"] = 10**15
    edit(copied / "metadata.json", **facts)
    with pytest.raises(InputError, match="is not a data set made by prepare-data"):
        load_info(str(copied))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy("(1099511627776,)"), "not hold one count for each piece"),
        (npy("(384,)"), "not hold one count for each piece"),
        (npy("(384,)", "O") + b"cos\nsystem\n(S'echo'\ntR.", "not hold one count for each piece"),
        (b"\0" * 4_000_000, "more counts than there are pieces"),
        (b"", "damaged"),
    ],
    ids=["endless", "cut off", "pickled", "a bomb", "empty"],
)
def test_harmful_counts(copied: Path, content: bytes, message: str):
    with zipfile.ZipFile(copied / "unigram.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for split in ("train", "validation"):
            archive.writestr(f"{split}.npy", content)
    with pytest.raises(InputError, match=message):
        unigram_perplexity(load_info(str(copied)))
    (copied / "unigram.npz").write_bytes(b"PK" * 50)
    with pytest.raises(InputError, match="is damaged"):
        unigram_perplexity(load_info(str(copied)))


def test_rows_can_be_skipped(info):
    """As if so many steps were done; also into the next epoch."""
    whole = take(train_batches(info, B, seed=3, start_step=0), 30)
    for steps in (2, 25):
        skipped = take(train_batches(info, B, seed=3, start_step=1, skip=steps * B), 4)
        np.testing.assert_array_equal(skipped, whole[steps + 1 : steps + 5])
    shifted = take(train_batches(info, B, seed=3, start_step=0, skip=1), 4)
    np.testing.assert_array_equal(shifted.reshape(-1, T)[:-1], whole[:4].reshape(-1, T)[1:])
    order = rows_from(info.rows["train"], 3, 4, 3)
    np.testing.assert_array_equal(stored(info, "train")[order], whole.reshape(-1, T)[4:7])


@pytest.mark.parametrize("error", [ValueError, RuntimeError, OSError, KeyError, ParseError])
def test_what_libraries_raise_for_damaged_rows_is_one_line(info, monkeypatch, error):
    """array_record raises the first three, TFDS the others."""

    def broken(*_):
        raise error("Corrupted\nblock")

    monkeypatch.setattr(tfds, "builder_from_directory", broken)
    with pytest.raises(InputError, match=r"cannot be read: '?Corrupted(\\n| )block'?; copy or prepare"):
        next(train_batches(info, 4, 0, 0))
