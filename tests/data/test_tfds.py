"""Text from a prepared TFDS data set, found by its directory or its name."""

import json
import os
from pathlib import Path

import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from mora_jax.errors import InputError
from train.data.rows.build import prepare
from train.data.text.tfds import tfds_shards
from train.data.tokenizer import train_tokenizer

DOCUMENTS = {
    "train": [[f"train document {i} has {i * i} words, ü" for i in range(n)] for n in (300, 0, 40)],
    "validation": [[f"held out document {i}" for i in range(70)]],
}


def a_data_set(folder: Path, feature: str = "text", suffix: str = "array_record") -> str:
    """Writes a data set as TFDS does, with the names of C4. Returns its folder."""
    directory = folder / "c4" / "en" / "3.1.0"
    directory.mkdir(parents=True)
    features = tfds.features.FeaturesDict({feature: tfds.features.Text(), "url": tfds.features.Text()})
    splits = []
    for split, shards in DOCUMENTS.items():
        for index, documents in enumerate(shards):
            name = f"c4-{split}.{suffix}-{index:05d}-of-{len(shards):05d}"
            writer = ArrayRecordWriter(str(directory / name), "group_size:1")
            for text in documents:
                writer.write(features.serialize_example({feature: text, "url": "u"}))
            writer.close()
        lengths = [len(documents) for documents in shards]
        splits.append(tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=1))
    tfds.folder_dataset.write_metadata(
        data_dir=directory, features=features, split_infos=splits, check_data=False
    )
    return str(directory)


def read(shards) -> list[str]:
    return [record.content for shard in shards for record in shard.records(0)]


def test_every_document_in_order_by_directory(tmp_path: Path):
    shards = tfds_shards(f"tfds:{a_data_set(tmp_path)}", "train", "")
    assert [shard.size for shard in shards] == [300, 40]
    assert read(shards) == [text for documents in DOCUMENTS["train"] for text in documents]
    assert [record.position for record in shards[0].records(0)] == list(range(1, 301))


def test_other_documents_have_another_hash(tmp_path: Path, monkeypatch):
    hashes = [shard.sha256() for shard in tfds_shards(f"tfds:{a_data_set(tmp_path / 'a')}", "train", "")]
    assert hashes == [s.sha256() for s in tfds_shards(f"tfds:{a_data_set(tmp_path / 'b')}", "train", "")]
    changed = [[*DOCUMENTS["train"][0][:-1], "other"], *DOCUMENTS["train"][1:]]
    monkeypatch.setitem(DOCUMENTS, "train", changed)
    others = [s.sha256() for s in tfds_shards(f"tfds:{a_data_set(tmp_path / 'c')}", "train", "")]
    assert [a == b for a, b in zip(hashes, others, strict=True)] == [False, True]


def test_by_name(tmp_path: Path):
    a_data_set(tmp_path)
    assert read(tfds_shards("tfds:c4/en", "validation", str(tmp_path))) == DOCUMENTS["validation"][0]


def test_rows_are_those_of_the_same_text_in_files(tmp_path: Path):
    source = f"tfds:{a_data_set(tmp_path)}"
    for name, shards in DOCUMENTS.items():
        for index, documents in enumerate(filter(None, shards)):
            lines = [json.dumps({"text": text}) for text in documents]
            (tmp_path / f"{name}.{index}.jsonl").write_text("\n".join(lines))
    train, validation = (str(tmp_path / f"{name}.*.jsonl") for name in ("train", "validation"))
    model = str(tmp_path / "t.model")
    train_tokenizer(train, model, 300)
    ours = prepare(source, "", model, 16, str(tmp_path / "a"), workers=1)
    files = prepare(train, validation, model, 16, str(tmp_path / "b"), workers=1)
    assert ours.rows == files.rows
    for path in (tmp_path / "a").glob("rows-*"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_a_missing_split(tmp_path: Path):
    with pytest.raises(InputError, match="has no split 'test'; it has train, validation"):
        tfds_shards(f"tfds:{a_data_set(tmp_path)}", "test", "")


def test_no_text_feature(tmp_path: Path):
    with pytest.raises(InputError, match="has no feature `text`"):
        tfds_shards(f"tfds:{a_data_set(tmp_path, feature='content')}", "train", "")


def test_a_format_that_needs_tensorflow(tmp_path: Path):
    with pytest.raises(InputError, match="is not stored as ArrayRecord"):
        tfds_shards(f"tfds:{a_data_set(tmp_path, suffix='tfrecord')}", "train", "")


def test_a_pipe_is_not_waited_for(tmp_path: Path):
    folder = a_data_set(tmp_path)
    path = next(Path(folder).glob("c4-train.*-00002-of-*"))
    path.unlink()
    os.mkfifo(path)
    for source, where in ((f"tfds:{folder}", ""), ("tfds:c4/en", str(tmp_path))):
        with pytest.raises(InputError, match="is not a regular file"):
            tfds_shards(source, "train", where)


@pytest.mark.parametrize("source", ["tfds:c4/en", "tfds:no_such_data_set", "tfds:/no/such/folder", "tfds:"])
def test_a_missing_data_set(tmp_path: Path, source: str):
    with pytest.raises(InputError, match=source) as error:
        tfds_shards(source, "train", str(tmp_path))
    assert "\n" not in str(error.value)
