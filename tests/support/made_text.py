"""Made-up text in C4's format, and data sets prepared from it."""

import gzip
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from train.data.rows.build import prepare
from train.data.rows.info import DataInfo
from train.data.text.entries import Record

T = 48  # tokens of a row in `prepared`
SHARDS = 4  # of training text in the fixture `text`


@dataclass(frozen=True)
class LongShard:
    """A shard of text that takes minutes to write. Worker processes can unpickle it."""

    name: str = "long"
    size: int = 1

    def records(self, skip_lines: int) -> Iterator[Record]:
        return itertools.repeat(Record("a b c d " * 2_000, 0), 50_000)

    def sha256(self) -> str:
        return ""


def random_texts(count: int, seed: int) -> list[str]:
    """Returns documents of 1 to 60 words each, from a vocabulary of 200 words."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 7))) for _ in range(200)]
    return [" ".join(rng.choices(words, k=rng.randint(1, 60))) for _ in range(count)]


def write_lines(path: Path, texts: Sequence[str]) -> str:
    """Writes texts as JSON lines, with gzip if the name ends in .gz. Returns the path."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return str(path)


def prepared(text: Path, out: Path | str, **changes: Any) -> DataInfo:
    """Prepares the text of the fixture `text` as rows of T tokens, with other arguments if given."""
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
    """Returns the rows of a split as TFDS reads them."""
    return [row["tokens"].tolist() for row in tfds.builder_from_directory(out).as_data_source(split)]


def contents(out: Path) -> dict[str, bytes]:
    """Returns the bytes of every file below a folder by name."""
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def npy(shape: str, descr: str = "<i8") -> bytes:
    """Returns the header of a .npy file that states any shape and type."""
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
