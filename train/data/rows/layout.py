"""The files of a prepared data set: their names, their types, and the bounds on what they may say.

rows-train.array_record-00000-of-00012 ...       rows of exactly T tokens, in ArrayRecord
rows-validation.array_record-00000-of-00001
dataset_info.json features.json metadata.json    TFDS's own description
tokenizer/                                       the tokenizer's files (earlier: tokenizer.model here)
unigram.npz                                      how often each piece occurs in each split
settings.json                                    what the rows depend on, written at the first start
text.json                                        the hash of each shard of text
unfinished/                                      records of finished shards, until the data set is complete
"""

import io
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from mora_jax.errors import InputError
from mora_jax.hf.tokenizer_files import FOLDER

NAME = "rows"
SPLITS = ("train", "validation")
UNIGRAM = "unigram.npz"
SETTINGS = "settings.json"
TEXT = "text.json"
UNFINISHED = "unfinished"
DESCRIBED = "dataset_info.json"  # written last: a data set that has it is complete
# The arrays of a row, (T,) each. Rows of joined documents have tokens alone.
TOKENS = "tokens"
WEIGHTS = "weights"  # 1 where the loss counts the token as the one to predict
SEGMENTS = "segments"  # the example of each token, from 1; 0 for padding
MAX_SEGMENTS = 2**16 - 1
Rows = Mapping[str, np.ndarray]  # (R, T) each

UINT16_PIECES = 65_536
# Far above any tokenizer. A forged file is refused before it takes memory.
MAX_PIECES = 2**24


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """Returns the smallest type that holds every token id: uint16 up to 65,536 pieces, uint32 above."""
    return np.uint16 if vocab_size <= UINT16_PIECES else np.uint32


def row_dtypes(vocab_size: int, joined: bool) -> dict[str, type[np.unsignedinteger]]:
    """Returns the arrays of a row and their types.

    Args:
      vocab_size: pieces of the tokenizer.
      joined: whether rows are cut from joined documents, so that every token counts.
    """
    more = {} if joined else {WEIGHTS: np.uint8, SEGMENTS: np.uint16}
    return {TOKENS: token_dtype(vocab_size), **more}


def row_features(sequence_length: int, vocab_size: int, joined: bool) -> tfds.features.FeaturesDict:
    """Returns TFDS's features of a row, (T,) each, stored as raw bytes that decode without a copy."""
    shape = (sequence_length,)
    return tfds.features.FeaturesDict(
        {
            name: tfds.features.Tensor(shape=shape, dtype=dtype, encoding="bytes")
            for name, dtype in row_dtypes(vocab_size, joined).items()
        }
    )


def row_serializer(sequence_length: int, vocab_size: int, joined: bool) -> Callable[[dict], bytes]:
    """Returns what turns a row, its arrays by name, into the bytes that TFDS reads."""
    serialize = row_features(sequence_length, vocab_size, joined).serialize_example
    if joined:
        return serialize

    def in_order(row: dict) -> bytes:  # otherwise, equal rows may have other bytes in another process
        example = tf_example_pb2.Example.FromString(serialize(row))  # pyright: ignore[reportAttributeAccessIssue]
        return example.SerializeToString(deterministic=True)

    return in_order


def shard_file(split: str, index: int, count: int) -> str:
    """Returns the name of one file of rows, as TFDS expects it."""
    return f"{NAME}-{split}.array_record-{index:05d}-of-{count:05d}"


def is_rows(name: str, splits: Collection[str] = SPLITS) -> bool:
    """Returns whether a file of this name holds rows of one of the splits."""
    return any(name.startswith(f"{NAME}-{split}.array_record-") for split in splits)


def belongs(name: str) -> bool:
    """Returns whether a file of this name, relative to a data set's folder, is a part of it when finished."""
    return name.rpartition("/")[0] in ("", FOLDER)


def count(value: Any) -> int:
    """Returns a count that a file states. Raises InputError for anything else."""
    if type(value) is not int or not 0 <= value < 2**62:
        raise InputError(f"{value!r} is not a count")
    return value


def piece_counts(npy: bytes, pieces: int) -> np.ndarray:
    """Returns how often each piece occurs, (V,), from the bytes of a .npy file.

    The header is compared and not parsed: NumPy evaluates it as Python, and allocates whatever it states.

    Raises:
      ValueError: the file is anything else than one int64 for each piece.
    """
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": (pieces,)})
    if not npy.startswith(header.getvalue()) or len(npy) != header.tell() + 8 * pieces:
        raise ValueError("it does not hold one count for each piece")
    return np.frombuffer(npy, "<i8", offset=header.tell())


def piece_count_bytes(pieces: int) -> int:
    """Returns an upper bound on the bytes of a .npy file with one count for each piece."""
    return pieces * 8 + 4096
