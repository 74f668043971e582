"""Batches of rows from a prepared data set, through TFDS's data source and grain.

The global batch of a step is a pure function of the data set, the seed and the step: neither the number of
processes nor an interruption changes it.
"""

import contextlib
import hashlib
import io
import sys
import zipfile
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import grain
import numpy as np
import tensorflow_datasets as tfds
from google.protobuf.json_format import ParseError
from jaxtyping import Float, Int

from mora_jax.errors import InputError
from mora_jax.io import read_bytes, read_json
from train.data.rows import layout
from train.data.rows.description import check_description
from train.data.rows.staging import staged

READ_THREADS = 2
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error)
# What array_record raises for rows that are no longer what they were, and TFDS for what it cannot make out.
_ROW_ERRORS = (ValueError, RuntimeError, OSError)
_TFDS_ERRORS = (LookupError, TypeError, AttributeError, AssertionError, ImportError, ParseError)
READ_AHEAD = 8  # batches


@dataclass(frozen=True)
class DataInfo:
    """What is known of a prepared data set. `rows` and `tokens` (those in rows) are by split."""

    directory: str
    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    eos_id: int
    sequence_length: int
    rows: dict[str, int]
    tokens: dict[str, int]


def load_info(directory: str, splits: Collection[str] = layout.SPLITS) -> DataInfo:
    """Reads and checks what a prepared data set says of itself; one in a bucket is copied to this machine.

    Args:
      directory: the data set.
      splits: those whose rows are needed; others are neither checked nor copied.

    Raises:
      InputError: not a finished data set, row files missing or of another size than they were written
        with, or a tokenizer that is not the one it was prepared with.
    """
    folder = staged(directory, splits)
    if (folder / layout.SETTINGS).exists() and not (folder / layout.DESCRIBED).exists():
        raise InputError(f"{directory} is not finished; run the same preparation again, it continues")
    try:
        facts = read_json(folder / "metadata.json")
        parts = facts.pop("splits")
        rows, tokens = (
            {split: layout.count(parts[split][what]) for split in layout.SPLITS}
            for what in ("rows", "tokens")
        )
        file_bytes = {split: layout.count(parts[split]["file_bytes"]) for split in layout.SPLITS}
        info = DataInfo(str(folder), str(folder / layout.TOKENIZER), **facts, rows=rows, tokens=tokens)
        _check_facts(info, file_bytes)
    except (InputError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{directory} is not a data set made by prepare-data; prepare one there") from error
    check_description(folder)
    _check_files(folder, {split: file_bytes[split] for split in splits})
    _check_tokenizer(info)
    return info


def train_batches(
    info: DataInfo,
    batch_size: int,
    seed: int,
    start_step: int,
    rows: Int[np.ndarray, "R"] | None = None,
) -> Iterator[Int[np.ndarray, "B T"]]:
    """Endless batches of training rows, int32, read ahead in threads; every epoch in another order.

    Args:
      batch_size: rows of the global batch.
      seed: of the order.
      start_step: the first step to yield; step s is the same whatever was read before.
      rows: which rows of each global batch are wanted here; all by default.

    Yields:
      (R, T).

    Raises:
      InputError: a batch that is larger than the split, or, as they are read, rows that are damaged or gone.
    """
    here = np.arange(batch_size) if rows is None else rows
    if info.rows["train"] < batch_size:
        raise InputError(
            f"{info.directory} has {info.rows['train']} training rows, fewer than one batch of {batch_size}; "
            "use a smaller batch_size or prepare more text"
        )
    order = _order(info.rows["train"], seed)

    def rows_of(step: int) -> list:
        return [order[step * batch_size + int(row)] for row in here]

    return _read(info, "train", grain.MapDataset.range(start_step, sys.maxsize).map(rows_of))


def first_rows(rows: int, batch_size: int, seed: int, step: int, count: int = 4) -> list[int]:
    """The numbers of the first training rows of a step's global batch: by them an order is known again."""
    order = _order(rows, seed)
    here = range(step * batch_size, step * batch_size + min(count, batch_size))
    return np.asarray([order[position] for position in here]).tolist()


def eval_batches(
    info: DataInfo,
    split: str,
    batch_size: int,
    max_batches: int | None,
    here: Int[np.ndarray, "R"] | None = None,
) -> Iterator[tuple[Int[np.ndarray, "B T"], Float[np.ndarray, "B"]]]:
    """Rows of a split in order, in batches of one shape; at most `max_batches`, None for the whole split.

    Args:
      batch_size: rows of a global batch.
      here: which rows of each global batch are wanted here; all by default.

    Yields:
      rows (R, T), int32, and their weights: 1, or 0 for a row that only fills up the last batch. It yields
      equally often whatever rows are wanted.

    Raises:
      InputError: no such split, or, as they are read, rows that are damaged or gone.
    """
    if split not in info.rows:
        raise InputError(f"{info.directory} has no split {split!r}; it has {', '.join(info.rows)}")
    count = -(-info.rows[split] // batch_size)
    rows = np.arange(count * batch_size).reshape(count, batch_size)[:max_batches]
    rows = rows if here is None else rows[:, here]
    weights = (rows < info.rows[split]).astype(np.float32)
    rows = np.minimum(rows, info.rows[split] - 1)  # the last row fills up the last batch
    steps = grain.MapDataset.range(len(rows)).map(lambda step: rows[step].tolist())
    return zip(_read(info, split, steps), weights, strict=True)


def unigram_perplexity(info: DataInfo) -> float:
    """Perplexity of the validation rows under the frequencies in the training rows, one added to each."""
    train_V, validation_V = _unigram(info)
    log_p_V = np.log(train_V + 1) - np.log(train_V.sum() + len(train_V))
    return float(np.exp(-(validation_V * log_p_V).sum() / validation_V.sum()))


def _order(rows: int, seed: int) -> grain.MapDataset:
    """Numbers of rows without end, every epoch in another order."""
    return grain.MapDataset.range(rows).seed(seed).shuffle().repeat()


def _read(info: DataInfo, split: str, steps: grain.MapDataset) -> Iterator[np.ndarray]:
    """The rows whose numbers `steps` gives as lists, one batch each, fetched in one call."""
    with _told(info, split):
        source = tfds.builder_from_directory(info.directory).as_data_source(split)  # pyright: ignore[reportCallIssue]

    def fetch(numbers: list[int]) -> np.ndarray:
        rows_RT = np.stack([row[layout.FIELD] for row in source.__getitems__(numbers)])
        if rows_RT.shape != (len(numbers), info.sequence_length):
            raise ValueError(f"its rows are no {info.sequence_length} tokens each")
        return rows_RT.astype(np.int32)

    options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=READ_AHEAD)
    return _all(info, split, iter(steps.map(fetch).to_iter_dataset(options)))  # pyright: ignore[reportCallIssue]


def _all(info: DataInfo, split: str, batches: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    while True:
        with _told(info, split):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


@contextlib.contextmanager
def _told(info: DataInfo, split: str) -> Iterator[None]:
    """Raises InputError for what array_record and TFDS raise where a data set is not what was prepared."""
    try:
        yield
    except (*_ROW_ERRORS, *_TFDS_ERRORS) as error:
        load_info(info.directory, (split,))  # says it better, where a file is cut off or gone
        said = " ".join(str(error).split())[:200]
        raise InputError(f"{info.directory} cannot be read: {said}; copy or prepare it again") from error


def _unigram(info: DataInfo) -> list[np.ndarray]:
    """How often each piece occurs in each split: [(V,), (V,)]."""
    path = Path(info.directory) / layout.UNIGRAM
    largest = layout.piece_count_bytes(info.vocab_size)
    try:
        with zipfile.ZipFile(io.BytesIO(read_bytes(path, 2 * largest))) as archive:
            parts = [archive.getinfo(f"{split}.npy") for split in layout.SPLITS]
            if any(part.file_size > largest for part in parts):
                raise ValueError("it holds more counts than there are pieces")
            return [layout.piece_counts(archive.read(part), info.vocab_size) for part in parts]
    except (OSError, ValueError, LookupError, EOFError, NotImplementedError, *_ZIP_ERRORS) as error:
        raise InputError(f"{path} is damaged ({error}); copy or prepare the data set again") from error


def _check_facts(info: DataInfo, file_bytes: dict[str, int]) -> None:
    """Raises InputError for what no preparation writes, and what could take more memory than the rows do."""
    for value in (info.vocab_size, info.eos_id, info.sequence_length):
        layout.count(value)
    right = 2 <= info.sequence_length < 2**31 and info.eos_id < info.vocab_size <= layout.MAX_PIECES
    right &= isinstance(info.tokenizer_sha256, str)
    right &= all(info.rows[split] <= file_bytes[split] for split in layout.SPLITS)  # a row takes some bytes
    if not right:
        raise InputError("no such data set is prepared")


def _check_files(folder: Path, file_bytes: dict[str, int]) -> None:
    for split, expected in file_bytes.items():
        held = sum(file.stat().st_size for file in folder.glob(f"{layout.NAME}-{split}.array_record-*"))
        if held != expected:
            raise InputError(
                f"{folder}: the {split} rows take {held} bytes, not {expected}; copy or prepare it again"
            )


def _check_tokenizer(info: DataInfo) -> None:
    tokenizer = Path(info.tokenizer)
    if not tokenizer.exists() or _sha256(tokenizer) != info.tokenizer_sha256:
        raise InputError(f"{tokenizer} is not the tokenizer that the rows were made with; put that one back")


def _sha256(tokenizer: Path) -> str:
    return hashlib.sha256(read_bytes(tokenizer, layout.TOKENIZER_BYTES)).hexdigest()
