"""Text in files: JSON lines and Parquet, on any `etils.epath` path."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from etils import epath

from mora_jax.errors import InputError, reason
from mora_jax.io import refuse_lfs_pointer
from train.data.text import jsonl, parquet
from train.data.text.entries import TEXT_KEY, Record, bad_entry
from train.data.text.forms import TEXT, Form
from train.storage.buckets import in_bucket
from train.storage.files import sha256

PARQUET = ".parquet"
SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".zst", PARQUET)  # in any case
WILDCARDS = "*?["


@dataclass(frozen=True)
class FileShard:
    """One file of text. `size` and `Record.position` count bytes of the file."""

    path: epath.Path
    size: int
    form: Form = TEXT

    @property
    def name(self) -> str:
        return self.path.name

    def records(self, skip_lines: int) -> Iterator[Record]:
        return records(self.path, skip_lines, self.form)

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


def file_shards(source: str, form: Form = TEXT) -> list[FileShard]:
    """Returns the files of `source` with their sizes. Raises InputError as `shards` does."""
    return [FileShard(path, path.stat().length, form) for path in shards(source)]


def documents(path: epath.PathLike, skip_lines: int, key: str = TEXT_KEY) -> Iterator[str]:
    """Yields the texts of one file, in order; skips at most `skip_lines` bad lines or rows.

    Raises:
      InputError: see `records`.
    """
    for record in records(epath.Path(path), skip_lines, Form("text", (key,))):
        if record.content is not None:
            yield str(record.content)


def records(path: epath.Path, skip_lines: int, form: Form = TEXT) -> Iterator[Record]:
    """Yields the entries of one file, in order; skips at most `skip_lines` bad ones.

    Args:
      path: a Parquet file, if its name says so; else JSON lines.
      skip_lines: bad lines or rows that may be skipped.
      form: which keys of a line of JSON, or columns, hold what.

    Raises:
      InputError: the file is missing, truncated or corrupt, or has one bad entry too many (not JSON, or not
        of the form). The message names the file and the line or row, from 1.
    """
    skipped = 0
    try:
        with path.open("rb") as file:
            refuse_lfs_pointer(path, file.read(64))
        reader = parquet if path.name.lower().endswith(PARQUET) else jsonl
        for entry in reader.entries(path, form):
            skipped += entry.content is None
            place = f"{path}: {entry.place}"
            if skipped > skip_lines:
                raise bad_entry(place, entry.wrong, skip_lines)
            yield Record(entry.content, entry.position, place)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {reason(error)}") from error


def _matches(path: epath.Path) -> list[epath.Path]:
    if path.is_dir():
        return [file for file in path.iterdir() if file.name.lower().endswith(SUFFIXES)]
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
