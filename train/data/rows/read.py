"""Batches of rows from a prepared data set, through TFDS's data source and grain.

The global batch of a step is a pure function of the data set, the seed, the skipped rows and the step. The
number of processes and interruptions do not change it.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator

import grain
import numpy as np
import tensorflow_datasets as tfds
from google.protobuf.json_format import ParseError
from jaxtyping import Float, Int

from mora_jax.errors import InputError
from mora_jax.models.batch import Batch
from train.data.rows import layout
from train.data.rows.info import DataInfo, check_trainable, load_info

READ_THREADS = 2
READ_AHEAD = 8  # batches
# What array_record raises for damaged rows, and TFDS for a description that it cannot interpret.
_ROW_ERRORS = (ValueError, RuntimeError, OSError)
_TFDS_ERRORS = (LookupError, TypeError, AttributeError, AssertionError, ImportError, ParseError)


def train_batches(
    info: DataInfo,
    batch_size: int,
    seed: int,
    start_step: int,
    rows: Int[np.ndarray, "R"] | None = None,
    skip: int = 0,
    document_mask: bool = False,
) -> Iterator[Batch]:
    """Yields batches of training rows without end, in another order every epoch; threads read ahead.

    Args:
      info: the data set.
      batch_size: rows of the global batch.
      seed: of the order.
      start_step: first step to yield. The batch of step s does not depend on it.
      rows: positions in each global batch that this process reads; all by default.
      skip: rows of the order that come before the first batch.
      document_mask: whether each document of joined ones is a segment. Examples are segments always.

    Yields:
      The rows as NumPy arrays: (R, T) each, int32, weights float32. Joined documents have no weights.

    Raises:
      InputError: there is no training split, it is smaller than the batch, or nothing is put around the
        documents that should be segments; or later, rows are damaged.
    """
    here = np.arange(batch_size) if rows is None else rows
    check_trainable(info)
    if info.rows["train"] < batch_size:
        raise InputError(
            f"{info.directory} has {info.rows['train']} training rows, fewer than one batch of {batch_size}; "
            "lower --batch-size or prepare more text"
        )
    order = _order(info.rows["train"], seed)

    def rows_of(step: int) -> list:
        return [order[skip + step * batch_size + int(row)] for row in here]

    steps = grain.MapDataset.range(start_step, sys.maxsize).map(rows_of)
    return _read(info, "train", steps, document_mask)


def rows_from(rows: int, seed: int, first: int, count: int) -> list[int]:
    """Returns the numbers of `count` training rows from position `first` of the order, which identify it."""
    order = _order(rows, seed)
    return np.asarray([order[position] for position in range(first, first + count)]).tolist()


def eval_batches(
    info: DataInfo,
    split: str,
    batch_size: int,
    max_batches: int | None,
    here: Int[np.ndarray, "R"] | None = None,
    document_mask: bool = False,
) -> Iterator[Batch]:
    """Yields the rows of a split in order, in batches of one shape.

    The number of batches does not depend on `here`: every process yields equally often.

    Args:
      info: the data set.
      split: "train" or "validation".
      batch_size: rows of a global batch.
      max_batches: batches at most; None for the whole split.
      here: positions in each global batch that this process reads; all by default.
      document_mask: as for `train_batches`.

    Yields:
      As `train_batches`, always with weights. Rows that pad the last batch weigh 0.

    Raises:
      InputError: there is no such split, or as `train_batches`; or later, rows are damaged or missing.
    """
    if split not in info.rows:
        raise InputError(f"{info.directory} has no split {split!r}; it has {', '.join(info.rows)}")
    count = -(-info.rows[split] // batch_size)
    rows = np.arange(count * batch_size).reshape(count, batch_size)[:max_batches]
    rows = rows if here is None else rows[:, here]
    counts = (rows < info.rows[split]).astype(np.float32)
    rows = np.minimum(rows, info.rows[split] - 1)  # the last row pads the last batch
    steps = grain.MapDataset.range(len(rows)).map(lambda step: rows[step].tolist())
    return map(_weighed, _read(info, split, steps, document_mask), counts)


def _weighed(batch: Batch, counts_R: Float[np.ndarray, "R"]) -> Batch:
    """Returns a batch in which each row counts as often as stated."""
    weights_RT = np.broadcast_to(counts_R[:, None], batch.tokens_BT.shape)
    weights_RT = weights_RT if batch.weights_BT is None else weights_RT * batch.weights_BT
    return dataclasses.replace(batch, weights_BT=weights_RT)


def _order(rows: int, seed: int) -> grain.MapDataset:
    """Returns the numbers of the rows without end, in another order every epoch."""
    return grain.MapDataset.range(rows).seed(seed).shuffle().repeat()


def _read(info: DataInfo, split: str, steps: grain.MapDataset, document_mask: bool) -> Iterator[Batch]:
    """Returns an iterator of batches. `steps` holds the row numbers of each, which one call fetches."""
    if document_mask and info.joined and info.bos_id is None and info.eos_id is None:
        raise InputError(
            f"data.document_mask: {info.directory} has no token between its documents; prepare it with --eos"
        )
    with _as_input_error(info, split):
        source = tfds.builder_from_directory(info.directory).as_data_source(split)  # pyright: ignore[reportCallIssue]

    def fetch(numbers: list[int]) -> Batch:
        rows = source.__getitems__(numbers)
        arrays = {n: np.stack([row[n] for row in rows]) for n in layout.row_dtypes(1, info.joined)}
        if any(array_RT.shape != (len(numbers), info.sequence_length) for array_RT in arrays.values()):
            raise ValueError(f"not every row has {info.sequence_length} tokens")
        return _batch(info, split, arrays, document_mask)

    options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=READ_AHEAD)
    return _checked(info, split, iter(steps.map(fetch).to_iter_dataset(options)))  # pyright: ignore[reportCallIssue]


def _batch(info: DataInfo, split: str, arrays: layout.Rows, document_mask: bool) -> Batch:
    """Returns rows as they are stored as a batch of NumPy arrays."""
    tokens_RT = arrays[layout.TOKENS].astype(np.int32)
    weights_RT, segments_RT, most = None, None, 0
    if not info.joined:
        weights_RT = arrays[layout.WEIGHTS].astype(np.float32)
        segments_RT = arrays[layout.SEGMENTS].astype(np.int32)
    elif document_mask:
        segments_RT = _documents(info, tokens_RT)
    if segments_RT is not None and split in info.counts:
        most = info.counts[split].most_segments
    return Batch(tokens_RT, weights_RT, segments_RT, most_segments=most)  # pyright: ignore[reportArgumentType]


def _documents(info: DataInfo, tokens_RT: Int[np.ndarray, "R T"]) -> Int[np.ndarray, "R T"]:
    """Returns the document of each token, counted from 1 in each row."""
    begins_RT = np.zeros(tokens_RT.shape, np.int32)
    if info.eos_id is not None:
        begins_RT[:, 1:] = tokens_RT[:, :-1] == info.eos_id
    else:
        begins_RT[:, 1:] = tokens_RT[:, 1:] == info.bos_id
    return 1 + np.cumsum(begins_RT, axis=1, dtype=np.int32)


def _checked(info: DataInfo, split: str, batches: Iterator[Batch]) -> Iterator[Batch]:
    while True:
        with _as_input_error(info, split):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


@contextlib.contextmanager
def _as_input_error(info: DataInfo, split: str) -> Iterator[None]:
    """Turns what array_record and TFDS raise for a damaged data set into an InputError."""
    try:
        yield
    except (*_ROW_ERRORS, *_TFDS_ERRORS) as error:
        load_info(info.directory, (split,))  # raises a better message if a file is truncated or missing
        said = " ".join(str(error).split())[:200]
        raise InputError(
            f"{info.directory} cannot be read: {said}; copy or prepare the data set again"
        ) from error
