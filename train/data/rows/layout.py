"""What a prepared data set looks like on disk; written by `builder`, read by `read`.

rows-train.array_record-00000-of-00012 ...       rows of exactly T tokens, in ArrayRecord
rows-validation.array_record-00000-of-00001
dataset_info.json features.json metadata.json    TFDS's own description
tokenizer.model                                  a copy of the tokenizer
unigram.npz                                      how often each piece occurs in each split
settings.json                                    what the rows depend on, fixed at the first start
unfinished/                                      shard records, there until the data set is whole
"""

import io
from collections.abc import Collection
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from mora_jax.errors import InputError

NAME = "rows"
SPLITS = ("train", "validation")
TOKENIZER = "tokenizer.model"
UNIGRAM = "unigram.npz"
SETTINGS = "settings.json"
UNFINISHED = "unfinished"
DESCRIBED = "dataset_info.json"
FIELD = "tokens"

UINT16_PIECES = 65_536
# Far above any tokenizer: what a file says must not take memory before it is refused.
MAX_PIECES = 2**24
TOKENIZER_BYTES = 1 << 26


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """The smallest type that holds every token id: uint16 up to 65,536 pieces, uint32 above."""
    return np.uint16 if vocab_size <= UINT16_PIECES else np.uint32


def row_features(sequence_length: int, vocab_size: int) -> tfds.features.FeaturesDict:
    """TFDS's feature of one row: `{"tokens": (T,)}`, stored as raw bytes, which decode without a copy."""
    row = tfds.features.Tensor(shape=(sequence_length,), dtype=token_dtype(vocab_size), encoding="bytes")
    return tfds.features.FeaturesDict({FIELD: row})


def is_rows(name: str, splits: Collection[str] = SPLITS) -> bool:
    """Whether a file of this name holds rows of one of the splits."""
    return any(name.startswith(f"{NAME}-{split}.array_record-") for split in splits)


def shard_file(split: str, index: int, count: int) -> str:
    """The name of a split's output file, as TFDS expects it."""
    return f"{NAME}-{split}.array_record-{index:05d}-of-{count:05d}"


def count(value: Any) -> int:
    """A count that a file holds. Raises InputError for what is none."""
    if type(value) is not int or not 0 <= value < 2**62:
        raise InputError(f"{value!r} is no count")
    return value


def piece_counts(npy: bytes, pieces: int) -> np.ndarray:
    """How often each piece occurs, (V,), from NumPy's format.

    The header is compared and not read: NumPy parses it as Python, and would take what memory it says.

    Raises:
      ValueError: if it is anything else than a count for each piece.
    """
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": (pieces,)})
    if not npy.startswith(header.getvalue()) or len(npy) != header.tell() + 8 * pieces:
        raise ValueError("it holds no count for each piece")
    return np.frombuffer(npy, "<i8", offset=header.tell())


def piece_count_bytes(pieces: int) -> int:
    """The most bytes that counts of so many pieces take: int64, and a header."""
    return pieces * 8 + 4096
