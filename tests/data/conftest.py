"""What the tests of data share: a little made-up text with its tokenizer."""

from pathlib import Path

import pytest
from made_text import SHARDS, random_texts, write_lines

from train.data.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four training files (one holds one short document), a validation file and a tokenizer."""
    folder = tmp_path_factory.mktemp("text")
    for index in range(SHARDS):
        texts = ["short"] if index == 2 else random_texts(60, seed=index)
        write_lines(folder / f"train.{index}.json.gz", texts)
    write_lines(folder / "validation.json.gz", random_texts(30, seed=9))
    train_tokenizer(str(folder / "train.*"), str(folder / "t.model"), 400)
    return folder
