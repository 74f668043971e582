"""Preparation: exact rows with any number of workers, and every refusal."""

import gzip
import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from made_text import T, contents, prepared, random_texts, rows, write_lines
from made_tokenizers import TEMPLATE, byte_level, write_folder
from sentencepiece import sentencepiece_model_pb2

from mora_jax.errors import InputError
from train.data.rows import shard
from train.data.rows.build import prepare
from train.data.rows.info import content_hash, load_info
from train.data.rows.options import RowOptions
from train.data.rows.read import eval_batches, train_batches
from train.data.text.forms import Form
from train.data.tokenizer import Tokenizer, train_tokenizer


def documents(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in gzip.decompress(path.read_bytes()).splitlines()]


def expected_rows(files: list[Path], tokenizer: Tokenizer) -> list[list[int]]:
    """Returns the expected rows of every file: EOS after each document, complete rows only."""
    result = []
    for file in files:
        stream = [
            t for d in documents(file) for t in [*tokenizer.encoder.encode(d), tokenizer.encoder.eos_id()]
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


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_what_is_put_around_documents(text: Path, tmp_path: Path, bos: bool, eos: bool):
    info = prepared(text, tmp_path / "d", bos=bos, eos=eos)
    processor = Tokenizer.load(text / "t.model").encoder
    stream = [
        token
        for document in documents(text / "validation.json.gz")
        for token in [*[1] * bos, *processor.encode(document), *[2] * eos]
    ]
    assert list(itertools.chain(*rows(tmp_path / "d", "validation"))) == stream[: len(stream) // T * T]
    assert (info.bos_id, info.eos_id) == (1 if bos else None, 2 if eos else None)
    with pytest.raises(InputError, match=rf"was prepared with another bos_id \({info.bos_id}, now"):
        prepared(text, tmp_path / "d", bos=not bos, eos=eos)


def test_validation_text_alone_can_only_be_evaluated_on(text: Path, tmp_path: Path):
    whole, info = prepared(text, tmp_path / "whole"), prepared(text, tmp_path / "alone", source="")
    assert info.rows == {"validation": whole.rows["validation"]}
    assert rows(tmp_path / "alone", "validation") == rows(tmp_path / "whole", "validation")
    assert prepared(text, tmp_path / "alone", source="") == info  # has nothing to do
    assert next(eval_batches(info, "validation", 2, 1)).tokens_BT.shape == (2, T)
    assert content_hash(info) != content_hash(whole)
    with pytest.raises(
        InputError, match="alone has validation text alone, for mora evaluate; to train, prepare with"
    ):
        train_batches(info, 1, seed=0, start_step=0)
    with pytest.raises(InputError, match=r"another train \(0 shards of text, now 4 shards"):
        prepared(text, tmp_path / "alone")


def test_other_keys_of_the_text_are_read_and_are_other_text(text: Path, tmp_path: Path):
    lines = [json.dumps({"text": "other", "body": text}) for text in random_texts(30, seed=1)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    write_lines(tmp_path / "b.jsonl", random_texts(30, seed=1))
    prepared(text, tmp_path / "b", source="", validation=str(tmp_path / "b.jsonl"))
    change = {"source": "", "validation": str(tmp_path / "a.jsonl")}
    info = prepared(text, tmp_path / "a", options=RowOptions(Form("text", ("body",))), **change)
    assert info.text_key == "body"
    assert rows(tmp_path / "a", "validation") == rows(tmp_path / "b", "validation")
    with pytest.raises(InputError, match=r"another text_key \(body, now text\)"):
        prepared(text, tmp_path / "a", **change)


def test_only_the_last_partial_row_of_a_shard_is_dropped(text: Path, tmp_path: Path):
    prepared(text, tmp_path / "d")
    tokenizer = Tokenizer.load(text / "t.model")
    counts = tfds.builder_from_directory(tmp_path / "d").info.metadata["splits"]["train"]
    lengths = [
        sum(len(tokenizer.encoder.encode(d)) + 1 for d in documents(path))
        for path in sorted(text.glob("train.*.gz"))
    ]
    assert counts["tokens"] + counts["dropped_tokens"] == sum(lengths)
    assert counts["dropped_tokens"] == sum(length % T for length in lengths)
    assert counts["documents"] == 60 * 3 + 1


def test_rows_do_not_depend_on_block_size(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    prepared(text, tmp_path / "one")
    monkeypatch.setattr(shard, "BLOCK_RECORDS", 7)
    prepared(text, tmp_path / "many")
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


@pytest.mark.slow  # test_workers.py compares the rows of one and of two workers
def test_rows_do_not_depend_on_the_number_of_workers(text: Path, tmp_path: Path):
    prepared(text, tmp_path / "one", workers=1)
    prepared(text, tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_metadata_states_the_tokenizer_and_the_type(text: Path, tmp_path: Path):
    info = prepared(text, tmp_path / "d")
    tokenizer = Tokenizer.load(text / "t.model")
    described = tfds.builder_from_directory(tmp_path / "d").info
    assert described.metadata["tokenizer_sha256"] == tokenizer.sha256 == info.tokenizer_sha256
    assert (described.metadata["sequence_length"], described.metadata["vocab_size"]) == (T, 400)
    assert described.metadata["eos_id"] == info.eos_id == tokenizer.eos_id
    assert described.splits["train"].num_examples == info.rows["train"]
    assert described.features["tokens"].np_dtype == np.uint16
    assert (tmp_path / "d" / "tokenizer" / "tokenizer.model").read_bytes() == (text / "t.model").read_bytes()
    assert not (tmp_path / "d" / "unfinished").exists()


def test_a_large_vocabulary_is_stored_as_uint32(text: Path, tmp_path: Path):
    model = sentencepiece_model_pb2.ModelProto.FromString((text / "t.model").read_bytes())
    for index in range(70_000):
        piece = model.pieces.add(piece=f"Q{index}Q", score=0)
        piece.type = sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED
    (tmp_path / "large.model").write_bytes(model.SerializeToString())
    write_lines(tmp_path / "train.json.gz", [f"Q{i}Q" for i in range(69_000, 70_000)])
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
    train_tokenizer(str(text / "train.*.gz"), str(text / "other.model"), 390, overwrite=True)
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


def test_a_tokenizer_that_cannot_be_exported_is_told(text: Path, tmp_path: Path, monkeypatch, capfd):
    def refuse(*_):
        raise InputError("cannot be exported exactly")

    monkeypatch.setattr("mora_jax.hf.check_tokenizer", refuse, raising=False)
    prepared(text, tmp_path / "d")
    assert "warning: cannot be exported exactly; models can be trained" in capfd.readouterr().err


def test_a_data_set_keeps_all_files_of_a_tokenizer(text: Path, tmp_path: Path):
    made = byte_level(random_texts(100, seed=1))
    folder = write_folder(
        tmp_path / "hf", made, chat_template=TEMPLATE, generation_config={"eos_token_id": 0}
    )
    info = prepared(text, tmp_path / "d", tokenizer=str(folder))
    assert contents(tmp_path / "d" / "tokenizer") == contents(folder)
    assert info.tokenizer_sha256 == hashlib.sha256(made.encode()).hexdigest()
    encoder = Tokenizer.load(folder).encoder
    stream = [
        token
        for document in documents(text / "validation.json.gz")
        for token in [*encoder.encode(document, add_special_tokens=False).ids, 0]
    ]
    assert list(itertools.chain(*rows(tmp_path / "d", "validation"))) == stream[: len(stream) // T * T]
    again = prepared(text, tmp_path / "e", tokenizer=str(tmp_path / "d"))  # the tokenizer of a data set
    assert (again.tokenizer_sha256, again.rows) == (info.tokenizer_sha256, info.rows)
    (tmp_path / "d" / "tokenizer" / "tokenizer.json").write_text(made.replace("<|pad|>", "<|pod|>"))
    with pytest.raises(InputError, match="tokenizer is not the tokenizer that the rows were made with"):
        load_info(str(tmp_path / "d"))


def test_an_unknown_store_is_refused(text: Path):
    with pytest.raises(
        InputError, match="--out http://host/data is no path: give one on a disk, or in a bucket"
    ):
        prepared(text, "http://host/data")


def test_a_file_in_the_place_of_the_folder_is_refused(text: Path, tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        prepared(text, tmp_path / "file" / "d")


@pytest.mark.parametrize(("name", "value"), [("sequence_length", 1), ("skip_lines", -1), ("workers", -1)])
def test_numbers_out_of_range_are_refused(text: Path, tmp_path: Path, name: str, value: int):
    with pytest.raises(InputError, match=f"--{name.replace('_', '-')} must be at least"):
        prepared(text, tmp_path / "d", **{name: value})


def test_validation_text_is_required_and_differs_from_training_text(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(InputError, match="--validation is missing"):
        prepared(text, tmp_path / "d", validation="")
    with pytest.raises(InputError, match=r"train\.1\.json\.gz is in the training and the validation text"):
        prepared(text, tmp_path / "d", validation=str(text / "train.1.json.gz"))
    monkeypatch.chdir(text)
    with pytest.raises(InputError, match="in the training and the validation text"):
        prepared(text, tmp_path / "d", validation="train.1.json.gz")  # another name of the same file
    assert not (tmp_path / "d").exists()


def test_bad_lines_are_counted_over_all_files(text: Path, tmp_path: Path):
    for index in range(2):
        write_lines(tmp_path / f"{index}.json.gz", random_texts(50, seed=index))
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


def test_text_without_documents_is_refused(text: Path, tmp_path: Path):
    write_lines(tmp_path / "empty.json.gz", [])
    with pytest.raises(InputError, match=r"the train text \(empty\.json\.gz, \.\.\.\) holds no document"):
        prepared(text, tmp_path / "d", source=str(tmp_path / "empty.json.gz"))


def test_less_text_than_a_row_is_refused(text: Path, tmp_path: Path):
    write_lines(tmp_path / "small.json.gz", ["few words"])
    with pytest.raises(InputError, match=f"the validation text has .* fewer than a row of {T}"):
        prepared(text, tmp_path / "d", validation=str(tmp_path / "small.json.gz"))


@pytest.mark.slow
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
        workers=1,
    )
    processor = Tokenizer.load(model).encoder
    stream = [t for line in lines[:40] for t in [*processor.encode(json.loads(line)["text"]), 2]]
    assert list(itertools.chain(*rows(tmp_path / "d", "train"))) == stream[: len(stream) // 128 * 128]
    assert info.tokens["train"] == len(stream) // 128 * 128


def test_what_an_error_says_to_change_may_be_changed(text: Path, tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": "some words " * 400}) + "\n")
    change = {"source": str(tmp_path / "a.jsonl")}
    with pytest.raises(InputError, match="--text-key names the one to read"):
        prepared(text, tmp_path / "d", **change)
    change["validation"] = change["source"]
    with pytest.raises(InputError):
        prepared(text, tmp_path / "d", **change)
    change |= {"source": "", "options": RowOptions(Form("text", ("body",)))}
    assert prepared(text, tmp_path / "d", **change).rows["validation"] > 0
