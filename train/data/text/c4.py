"""Text in allenai/c4's format: JSON lines with a string `text`, plain or gzip, on any `etils.epath` path."""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from etils import epath

from mora_jax.errors import InputError, reason
from train.storage.buckets import in_bucket
from train.storage.files import sha256

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
# The longest line of C4 has a million bytes. Parsed JSON may take thirty times its own length in memory.
MAX_LINE_BYTES = 16 * 2**20
MAX_BLANK_LINES = 1_000_000  # in a row; in a few bytes of gzip there may be any number
WILDCARDS = "*?["


class Record(NamedTuple):
    """One line of a shard: its text, None for a skipped bad line, and where in the shard it ends."""

    text: str | None
    position: int


@dataclass(frozen=True)
class FileShard:
    """One file of JSON lines. `size` and `Record.position` count bytes of the file."""

    path: epath.Path
    size: int

    @property
    def name(self) -> str:
        return self.path.name

    def records(self, skip_lines: int) -> Iterator[Record]:
        return records(self.path, skip_lines)

    def sha256(self) -> str:
        """Returns the hash of the file. Raises InputError if it cannot be read."""
        try:
            return sha256(self.path)
        except OSError as error:
            raise InputError(f"{self.path} cannot be read: {reason(error)}") from error


def shards(source: str) -> list[epath.Path]:
    """Returns the files that a glob, a folder or a file name stands for, sorted by name.

    Raises:
      InputError: `source` matches no file, or its file system cannot be reached.
    """
    try:
        found = sorted(file for file in _matches(epath.Path(source).expanduser()) if not _is_pipe(file))
    except (OSError, ImportError, ValueError) as error:
        raise InputError(f"{source} cannot be read: {reason(error)}") from error
    if not found:
        raise InputError(
            f"{source} matches no file ({', '.join(SUFFIXES)} in a folder); check the path or the glob"
        )
    return found


def file_shards(source: str) -> list[FileShard]:
    """Returns the files of `source` with their sizes. Raises InputError as `shards` does."""
    return [FileShard(path, path.stat().length) for path in shards(source)]


def documents(path: epath.PathLike, skip_lines: int) -> Iterator[str]:
    """Yields the texts of one file, in order; skips at most `skip_lines` bad lines.

    Raises:
      InputError: see `records`.
    """
    return (record.text for record in records(epath.Path(path), skip_lines) if record.text is not None)


def records(path: epath.Path, skip_lines: int) -> Iterator[Record]:
    """Yields the lines of one file, in order; ignores blank lines and skips at most `skip_lines` bad ones.

    Raises:
      InputError: the file is missing, truncated or corrupt, or has one bad line too many (not JSON, no
        string `text`). The message names the file and the line, from 1.
    """
    skipped = blank = 0
    for number, line, position in _lines(path):
        blank = 0 if line.strip() else blank + 1
        if blank > MAX_BLANK_LINES:
            raise InputError(f"{path}: the {blank:,} lines up to line {number} are blank; this is no text")
        if blank:
            continue
        text, wrong = _parse(line)
        if wrong:
            skipped += 1
        if skipped > skip_lines:
            raise InputError(
                f"{path}: line {number} {wrong}; fix the line, or have mora prepare-data skip bad lines "
                f"with --skip-lines (now {skip_lines})"
            )
        yield Record(text, position)


def _matches(path: epath.Path) -> list[epath.Path]:
    if path.is_dir():
        return [file for file in path.iterdir() if file.name.endswith(SUFFIXES)]
    if path.is_file():
        return [path]
    # The glob starts at the last folder without a wildcard.
    fixed = next(p for p in (path, *path.parents) if not any(mark in str(p) for mark in WILDCARDS))
    if fixed == path or not fixed.is_dir():
        return []
    return [file for file in fixed.glob(str(path.relative_to(fixed))) if file.is_file()]


def _is_pipe(path: epath.Path) -> bool:
    """Returns whether a path is a pipe or a device, which epath takes for a file."""
    return not in_bucket(path) and not Path(path).is_file()


def _lines(path: epath.Path) -> Iterator[tuple[int, bytes, int]]:
    """Yields (number from 1, line, bytes of the file read so far). Raises InputError for a broken file."""
    try:
        with path.open("rb") as file:
            stream = _decompressed(path, file)
            number = 0
            while line := stream.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise InputError(
                        f"{path}: line {number} is longer than {MAX_LINE_BYTES >> 20} MiB; split the file"
                    )
                yield number, line, file.tell()
    except EOFError as error:
        raise InputError(f"{path} is a truncated gzip file; download it again") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path} is not a valid gzip file ({reason(error)}); download it again") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {reason(error)}") from error


def _decompressed(path: epath.Path, file: IO[bytes]) -> IO[bytes]:
    if path.suffix != ".gz":
        return file
    if path.stat().length == 0:  # gzip would read it as a file without lines
        raise InputError(f"{path} is empty, not a gzip file; download it again")
    return gzip.GzipFile(fileobj=file)  # type: ignore[return-value]


def _parse(line: bytes) -> tuple[str | None, str]:
    """Returns the text of a line and "", or None and what is wrong with the line."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # ValueError includes text that is not UTF-8
        return None, "is not JSON"
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        return None, "has no string `text`"
    if not text.isascii() and not _is_unicode(text):
        return None, "has a `text` with a lone surrogate, which is not Unicode"
    return text, ""


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
