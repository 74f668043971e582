"""JSON lines: one object a line, plain or compressed with gzip or Zstandard. allenai/c4 has this format."""

import gzip
import json
import zlib
from collections.abc import Iterator
from typing import IO

from backports import zstd
from etils import epath

from mora_jax.errors import InputError, reason
from train.data.text.entries import MAX_BYTES, Content, Entry
from train.data.text.forms import Form

MAX_BLANK_LINES = 1_000_000  # in a row; in a few bytes of gzip there may be any number
_PACKED = {".gz": "gzip", ".zst": "Zstandard"}


def entries(path: epath.Path, form: Form) -> Iterator[Entry]:
    """Yields the lines of one file, in order; ignores blank lines.

    Args:
      path: the file. Its suffix says how it is compressed.
      form: which keys of a line hold what.

    Raises:
      InputError: the file is truncated or corrupt, or a line is too long.
      OSError: the file cannot be read.
    """
    blank = 0
    for number, line, position in _lines(path):
        blank = 0 if line.strip() else blank + 1
        if blank > MAX_BLANK_LINES:
            raise InputError(f"{path}: the {blank:,} lines up to line {number} are blank; this is no text")
        if not blank:
            yield Entry(f"line {number}", *_parse(line, form), position)


def _lines(path: epath.Path) -> Iterator[tuple[int, bytes, int]]:
    """Yields (number from 1, line, bytes of the file read so far)."""
    packed = _PACKED.get(path.suffix.lower(), "")
    try:
        with path.open("rb") as file:
            stream = _decompressed(path, file, packed)
            number = 0
            while line := stream.readline(MAX_BYTES + 1):
                number += 1
                if len(line) > MAX_BYTES:
                    raise InputError(
                        f"{path}: line {number} is longer than {MAX_BYTES >> 20} MiB; split the file"
                    )
                yield number, line, file.tell()
    except EOFError as error:
        raise InputError(f"{path} is a truncated {packed} file; download it again") from error
    except (gzip.BadGzipFile, zlib.error, zstd.ZstdError) as error:
        raise InputError(
            f"{path} is not a valid {packed} file ({reason(error)}); download it again"
        ) from error


def _decompressed(path: epath.Path, file: IO[bytes], packed: str) -> IO[bytes]:
    if packed and path.stat().length == 0:  # gzip would read it as a file without lines
        raise InputError(f"{path} is empty, not a {packed} file; download it again")
    opened = {"gzip": lambda: gzip.GzipFile(fileobj=file), "Zstandard": lambda: zstd.ZstdFile(file)}
    return opened[packed]() if packed else file


def _parse(line: bytes, form: Form) -> tuple[Content | None, str]:
    """Returns the example of a line and "", or None and what is wrong with the line."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # ValueError includes text that is not UTF-8
        return None, "is not JSON"
    return form.content(value)
