"""Makes one ArrayRecord file of rows from one shard of text: the work of a worker process."""

import contextlib
import errno
import io
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from mora_jax.errors import InputError
from mora_jax.io import read_bytes, read_json, read_object
from train.data.rows import layout
from train.data.rows.counts import Counts
from train.data.rows.joined import Joined
from train.data.rows.options import JOINED, RowOptions
from train.data.rows.packed import Packed
from train.data.text.entries import Content, Record
from train.data.text.share import TextShard
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


class RowMaker(Protocol):
    """Turns the records of one shard into rows."""

    def add(self, block: Sequence[Record]) -> tuple[layout.Rows, Counts]: ...

    def finish(self) -> tuple[layout.Rows, Counts]: ...


@dataclass(frozen=True)
class Job:
    """One shard of text to write as rows: `target` is the file of rows, `record` that of their counts."""

    shard: TextShard
    tokenizer: Tokenizer
    sequence_length: int
    skip_lines: int
    target: Path
    record: Path
    options: RowOptions = JOINED

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
    """Writes the rows of a shard. Returns the counts, and how often the loss counts each piece, (V,)."""
    maker, size = _row_maker(job), job.tokenizer.vocab_size
    serialize = layout.row_serializer(job.sequence_length, size, job.options.joined)
    with _system_errors(path):
        writer = ArrayRecordWriter(str(path), "group_size:1")  # one row a group, for random access
    counts, unigram_V, position = Counts(), np.zeros(size, np.int64), 0

    def write(rows: layout.Rows) -> None:
        nonlocal unigram_V
        with _system_errors(path):
            for index in range(len(rows[layout.TOKENS])):
                writer.write(serialize({name: rows_RT[index] for name, rows_RT in rows.items()}))
        tokens_RT, weights_RT = rows[layout.TOKENS], rows.get(layout.WEIGHTS)
        counted_N = tokens_RT.ravel() if weights_RT is None else tokens_RT[weights_RT > 0]
        unigram_V += np.bincount(counted_N, minlength=size)

    for block in _blocks(job.shard.records(job.skip_lines)):
        rows, more = maker.add(block)
        write(rows)
        counts += more
        report(Advance(block[-1].position - position, more.documents, more.tokens + more.dropped_tokens))
        position = block[-1].position
    rows, more = maker.finish()
    write(rows)
    with _system_errors(path):
        writer.close()
    return replace(counts + more, file_bytes=path.stat().st_size), unigram_V


def _row_maker(job: Job) -> RowMaker:
    if job.options.joined:
        return Joined(job.tokenizer, job.sequence_length)
    return Packed(job.tokenizer, job.sequence_length, job.options, job.skip_lines)


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
        characters += _characters(record.content)
        if characters >= BLOCK_CHARACTERS or len(block) == BLOCK_RECORDS:
            yield block
            block, characters = [], 0
    if block:
        yield block


def _characters(content: Content | None) -> int:
    if isinstance(content, str):
        return len(content)
    texts = (message["content"] if isinstance(message, dict) else message for message in content or ())
    return sum(map(len, texts))
