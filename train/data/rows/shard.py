"""Makes one ArrayRecord file of rows from one shard of text: the work of a worker process."""

import contextlib
import errno
import io
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from mora_jax.errors import InputError
from mora_jax.io import read_bytes, read_json, read_object
from train.data.rows import layout
from train.data.rows.layout import FIELD, row_features, token_dtype
from train.data.text.entries import Record
from train.data.text.sources import TextShard
from train.data.tokenizer import Tokenizer
from train.storage.files import sync, write_whole

BLOCK_CHARACTERS = 1_000_000
BLOCK_RECORDS = 1_000
_TEXT = "text_sha256"  # in the record, beside the counts


class Advance(NamedTuple):
    """What was done since the last report. `units` are those of the shard's `size`."""

    units: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class Counts:
    """What one shard became. `tokens` are those in rows; `dropped_tokens` those of the last partial row."""

    documents: int = 0
    rows: int = 0
    tokens: int = 0
    dropped_tokens: int = 0
    skipped_lines: int = 0
    file_bytes: int = 0


@dataclass(frozen=True)
class Job:
    """One shard of text to write as rows: `target` is the file of rows, `record` that of their counts."""

    shard: TextShard
    tokenizer: Tokenizer
    sequence_length: int
    skip_lines: int
    target: Path
    record: Path

    @property
    def unigram(self) -> Path:
        """The file of piece counts, beside the record."""
        return self.record.with_suffix(".npy")

    @property
    def finished(self) -> bool:
        """Whether all files are there and undamaged, and of the text as it is now."""
        with contextlib.suppress(InputError):
            self.counts()
            self.piece_counts()
            return self.text_sha256() == self.shard.sha256()
        return False

    def counts(self) -> Counts:
        """Returns the counts of a finished job. Raises InputError if the record or the rows are damaged."""
        try:
            stated = {name: value for name, value in read_json(self.record).items() if name != _TEXT}
            counts = Counts(**stated)
            for value in astuple(counts):
                layout.count(value)
        except (InputError, TypeError, AttributeError) as error:
            raise InputError(f"{self.record} is damaged; run the same preparation again") from error
        if not self.target.is_file() or self.target.stat().st_size != counts.file_bytes:
            raise InputError(
                f"{self.target} has another size than {self.record} states; run the same preparation again"
            )
        return counts

    def text_sha256(self) -> str:
        """Returns the hash of the text that a finished job read, empty if an earlier version did it."""
        return str(read_object(self.record).get(_TEXT, ""))

    def piece_counts(self) -> np.ndarray:
        """Returns how often each piece occurs in the rows, (V,). Raises InputError for a damaged file."""
        pieces = self.tokenizer.vocab_size
        try:
            content = read_bytes(self.unigram, layout.piece_count_bytes(pieces))
            return layout.piece_counts(content, pieces)
        except ValueError as error:
            raise InputError(f"{self.unigram} is damaged; run the same preparation again") from error


def write_shard(job: Job, report: Callable[[Advance], None]) -> None:
    """Writes the rows of one shard and then its record, which marks the job as finished.

    Args:
      job: the shard and its files.
      report: called after every block of documents.

    Raises:
      InputError: the text is bad (see `files.records`). No file is left behind.
    """
    unfinished = job.record.with_suffix(f".rows-{secrets.token_hex(8)}")
    text = job.shard.sha256()
    try:
        counts, unigram_V = _write_rows(job, unfinished, report)
        sync(unfinished)
        job.record.unlink(missing_ok=True)  # one of earlier text
        sync(job.record.parent)
        unfinished.replace(job.target)
    finally:
        unfinished.unlink(missing_ok=True)
    sync(job.target.parent)
    npy = io.BytesIO()
    np.save(npy, unigram_V)
    write_whole(job.unigram, npy.getvalue())
    write_whole(job.record, json.dumps({**asdict(counts), _TEXT: text}))


def _write_rows(job: Job, path: Path, report: Callable[[Advance], None]) -> tuple[Counts, np.ndarray]:
    """Cuts the stream of tokens into rows and writes them. Returns the counts, and those of pieces, (V,)."""
    serialize = row_features(job.sequence_length, job.tokenizer.vocab_size).serialize_example
    with _system_errors(path):
        writer = ArrayRecordWriter(str(path), "group_size:1")  # one row a group, for random access
    documents, rows, skipped, position = 0, 0, 0, 0
    unigram_V = np.zeros(job.tokenizer.vocab_size, np.int64)
    rest = np.empty(0, token_dtype(job.tokenizer.vocab_size))
    for block in _blocks(job.shard.records(job.skip_lines)):
        texts = [record.text for record in block if record.text is not None]
        tokens = job.tokenizer.encode_documents(texts)
        tokens_N = np.concatenate([rest, tokens])
        end = len(tokens_N) // job.sequence_length * job.sequence_length
        rows_RT, rest = tokens_N[:end].reshape(-1, job.sequence_length), tokens_N[end:]
        with _system_errors(path):
            for row_T in rows_RT:
                writer.write(serialize({FIELD: row_T}))
        unigram_V += np.bincount(rows_RT.ravel(), minlength=len(unigram_V))
        documents += len(texts)
        rows += len(rows_RT)
        skipped += len(block) - len(texts)
        report(Advance(block[-1].position - position, len(texts), len(tokens)))
        position = block[-1].position
    with _system_errors(path):
        writer.close()
    in_rows = rows * job.sequence_length
    return Counts(documents, rows, in_rows, len(rest), skipped, path.stat().st_size), unigram_V


@contextlib.contextmanager
def _system_errors(path: Path) -> Iterator[None]:
    """Turns errors of ArrayRecord, which have the words of the system in their text, into an OSError."""
    try:
        yield
    except RuntimeError as error:
        numbers = (n for n in errno.errorcode if f" failed: {os.strerror(n)};" in str(error))
        number = next(numbers, errno.EIO)
        raise OSError(number, os.strerror(number), str(path)) from error


def _blocks(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Yields lists of records, bounded in number and characters: memory does not grow with the shard."""
    block, characters = [], 0
    for record in records:
        block.append(record)
        characters += len(record.text or "")
        if characters >= BLOCK_CHARACTERS or len(block) == BLOCK_RECORDS:
            yield block
            block, characters = [], 0
    if block:
        yield block
