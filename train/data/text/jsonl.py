"""JSON, plain or packed: one object a line, as allenai/c4 has it, or one array of objects."""

import codecs
import contextlib
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from typing import IO

from backports import zstd
from etils import epath

from mora_jax.errors import InputError, reason
from train.data.text.entries import MAX_BYTES, Content, Entry
from train.data.text.forms import Form

MAX_BLANK_LINES = 1_000_000  # in a row; in a few bytes of gzip there may be any number
_CHUNK = 1 << 20  # bytes
_ARRAY = re.compile(rb"(\xef\xbb\xbf)?\s*\[\s*(\{|$)")  # how an array of objects begins
_BETWEEN = re.compile(r"[\s,]*")  # its elements
_PACKED = {".gz": "gzip", ".zst": "Zstandard"}


def entries(path: epath.Path, form: Form) -> Iterator[Entry]:
    """Yields the lines of one file, in order, or the elements of one array; ignores blank lines.

    Args:
      path: the file. Its suffix says how it is compressed.
      form: which keys of a line hold what.

    Raises:
      InputError: the file is truncated or corrupt, a line is too long, or an array is no JSON.
      OSError: the file cannot be read.
    """
    blank = number = 0
    with _opened(path) as (stream, file):
        while line := stream.readline(MAX_BYTES + 1):
            number += 1
            if number == blank + 1 and _ARRAY.match(line):
                yield from _elements(path, line, stream, file, form)
                return
            if len(line) > MAX_BYTES:
                raise InputError(
                    f"{path}: line {number} is longer than {MAX_BYTES >> 20} MiB; split the file"
                )
            blank = 0 if line.strip() else blank + 1
            if blank > MAX_BLANK_LINES:
                raise InputError(
                    f"{path}: the {blank:,} lines up to line {number} are blank; this is no text"
                )
            if not blank:
                yield Entry(f"line {number}", *_parse(line, form), file.tell())


def _elements(
    path: epath.Path, start: bytes, stream: IO[bytes], file: IO[bytes], form: Form
) -> Iterator[Entry]:
    """Yields the objects of an array that begins with `start`, of which a few are in memory at a time."""
    decode, parse = codecs.getincrementaldecoder("utf-8-sig")().decode, json.JSONDecoder().raw_decode
    text, at, number, more = decode(start).lstrip().removeprefix("["), 0, 0, True
    while True:
        begin = _BETWEEN.match(text, at).end()  # pyright: ignore[reportOptionalMemberAccess]
        try:
            value, at = parse(text, begin)
        except (ValueError, RecursionError) as error:
            if text[begin:].strip() == "]" and not more:
                return
            if not more or len(text) - begin > MAX_BYTES:
                raise InputError(
                    f"{path}: element {number + 1} of its array is not JSON, or longer than "
                    f"{MAX_BYTES >> 20} MiB: {reason(error)}"
                ) from error
            content = stream.read(_CHUNK)
            text, at, more = text[begin:] + decode(content, not content), 0, bool(content)
            continue
        number += 1
        yield Entry(f"element {number}", *form.content(value), file.tell())


@contextlib.contextmanager
def _opened(path: epath.Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Yields the content of a file as a stream, and the file itself, of which some bytes were read so far."""
    packed = _PACKED.get(path.suffix.lower(), "")
    try:
        with path.open("rb") as file:
            yield _decompressed(path, file, packed), file
    except EOFError as error:
        raise InputError(f"{path} is a truncated {packed} file; download it again") from error
    except (gzip.BadGzipFile, zlib.error, zstd.ZstdError) as error:
        raise InputError(
            f"{path} is not a valid {packed} file ({reason(error)}); download it again"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text") from error


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
