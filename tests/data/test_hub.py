"""Data sets of the Hugging Face Hub, served on the loopback address."""

import json
from pathlib import Path

import pytest
from fake_hub import serving
from made_text import random_texts, write_lines

from mora_jax.errors import InputError
from train.data.rows.build import prepare
from train.data.text.hub import hub_files, is_dataset
from train.data.tokenizer import train_tokenizer

constants = pytest.importorskip("huggingface_hub.constants", reason="needs huggingface_hub")
NAME = "org/some-texts"


@pytest.fixture
def reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Returns what makes `huggingface_hub` use a server, and an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def to(url: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    return to


def folder_of(place: Path, *names: str) -> Path:
    for name in (*names, "README.md", "dataset_infos.json"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(json.dumps({"text": name}) + "\n")
    return place


def found(source: str, split: str) -> list[str]:
    return [file.name for file in hub_files(source, split)]


def test_the_files_of_a_split_are_downloaded(tmp_path: Path, reach):
    names = [f"data/{name}-0.jsonl" for name in ("train", "test", "val")]
    folder = folder_of(tmp_path / "hub", "data/train-1.jsonl", "x/trained.json", *names)
    with serving(folder, NAME, kind="dataset") as hub:
        reach(hub.url)
        for source in (NAME, f"hf://datasets/{NAME}", f"hf://datasets/{NAME}@main"):
            assert found(source, "train") == ["train-0.jsonl", "train-1.jsonl"]
        assert "data/test-0.jsonl" not in hub.downloads
        assert found(NAME, "validation") == ["val-0.jsonl"]
        assert found(f"hf://datasets/{NAME}/data/t*-0.jsonl", "validation") == [
            "test-0.jsonl",
            "train-0.jsonl",
        ]
        assert found(f"hf://datasets/{NAME}/x", "train") == ["trained.json"]
        with pytest.raises(InputError, match=r"/y has no file of train text .*; name some of its files"):
            found(f"hf://datasets/{NAME}/y", "train")
        with pytest.raises(InputError, match=r"org/other is no folder here, and .*/datasets has no dataset"):
            found("org/other", "train")
    assert found(NAME, "train") == ["train-0.jsonl", "train-1.jsonl"]  # from the cache: the server is gone
    reach("http://127.0.0.1:9")
    with pytest.raises(OSError, match=r"not in the cache, and .*:9/datasets cannot be read"):
        found("org/other", "train")


def test_files_that_name_no_split_are_training_text(tmp_path: Path, reach):
    folder = folder_of(tmp_path / "hub")
    write_lines(folder / "lines.jsonl", random_texts(60, seed=0))
    with serving(folder, NAME, kind="dataset") as hub:
        reach(hub.url)
        assert found(NAME, "train") == ["lines.jsonl"]
        with pytest.raises(InputError, match="has no file of validation text"):
            found(NAME, "validation")
        train_tokenizer(str(folder / "lines.jsonl"), str(tmp_path / "t.model"), 300)
        how = {"validation_share": 0.2, "workers": 1}
        info = prepare(NAME, "", str(tmp_path / "t.model"), 32, str(tmp_path / "out"), **how)
        assert info.rows["train"] > info.rows["validation"] > 0


def test_files_and_folders_are_no_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "folder").mkdir(parents=True)
    for source in ("org/folder", "text/missing.jsonl", "text/*.jsonl", "/a/b", "tfds:c4/en", "gs://a/b"):
        assert not is_dataset(source)
    assert is_dataset("org/missing")
