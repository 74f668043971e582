"""Small files that others wrote, read safely: only regular files, and no more bytes than expected.

And JSON that every reader accepts: it has no NaN, and Python would write one.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath

from mora_jax.errors import InputError, reason

JSON_LIMIT = 1 << 24  # bytes; far more than a config or an index of tensors takes
_STORES = ("gs", "s3")
_LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"


def path_of(path: epath.PathLike, name: str = "") -> epath.Path:
    """Returns a path on a disk or in a bucket of gs:// or s3://, with `~` spelled out.

    Args:
      path: as a user gives it.
      name: the flag or key that gives it, for the message.

    Raises:
      InputError: if it is empty, a URL of anything else, or a path that libraries take for another one: with
        a backslash, characters that cannot be printed, or a name that begins with `~` and is no user's.
    """
    text, named = os.fspath(path), f"{name} " if name else ""
    scheme, is_url, _ = text.partition("://")
    if not text:
        raise InputError(f"{named}is empty; give a path, or . for the current folder")
    if is_url and scheme not in _STORES:
        raise InputError(f"{named}{text} is no path: give one on a disk, or in a bucket of gs:// or s3://")
    if not text.isprintable() or "\\" in text:
        raise InputError(f"{named}{text!r} has a backslash or a character that cannot be printed")
    spelled = epath.Path(text if is_url else os.path.expanduser(text))  # noqa: PTH111 (pathlib raises RuntimeError)
    if str(spelled).startswith("~"):
        raise InputError(f"{named}{text} is read as the home folder of a user, who is not known here")
    return spelled


def is_unicode(value: Any) -> bool:
    """Returns whether a text, or all text in a value of JSON, is Unicode: it has no lone surrogate.

    Native code fails at those, each library in its own way.
    """
    try:
        (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode()
    except (UnicodeEncodeError, RecursionError):
        return False
    return True


def read_bytes(path: epath.PathLike, limit: int) -> bytes:
    """Returns the content of a file.

    Raises:
      InputError: if the file is missing, is not a regular file (a folder, a pipe, a device), has more than
        `limit` bytes, is a Git LFS pointer, or cannot be read.
    """
    try:
        file = path_of(path)
        if not file.exists():
            raise InputError(f"{file} is missing")
        if not is_plain_file(file):
            raise InputError(f"{file} is not a regular file")
        size = file.stat().length
        if size > limit:
            raise InputError(f"{file}: it has {size:,} bytes; at most {limit:,} are read")
        with file.open("rb") as stream:
            content = stream.read(size)  # Python allocates what is asked for, so not `limit`
        refuse_lfs_pointer(file, content)
        return content
    except InputError:
        raise
    except (OSError, ImportError, ValueError) as error:  # also a missing package or an invalid name
        raise InputError(f"{str(path)!r} cannot be read: {reason(error)}") from error


def refuse_lfs_pointer(path: epath.PathLike, start: bytes) -> None:
    """Raises InputError if a file is a Git LFS pointer: a line of text in the place of a large file.

    >>> refuse_lfs_pointer("model.safetensors", b"version https://git-lfs.github.com/spec/v1\\noid 4d7a")
    Traceback (most recent call last):
    mora_jax.errors.InputError: model.safetensors is a Git LFS pointer: run git lfs pull where it lies

    Args:
      path: the file, for the message.
      start: its content, or at least its first 64 bytes.
    """
    if start.startswith(_LFS_POINTER):
        raise InputError(f"{os.fspath(path)} is a Git LFS pointer: run git lfs pull where it lies")


def is_plain_file(file: epath.Path) -> bool:
    """Returns whether the path is a regular file: no folder, no pipe, no device."""
    return file.exists() and not file.is_dir() if "://" in str(file) else Path(file).is_file()


def read_text(path: epath.PathLike, limit: int) -> str:
    """Returns the content of a UTF-8 file. Raises InputError as `read_bytes` does, and for other text."""
    try:
        return read_bytes(path, limit).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text") from error


def read_json(path: epath.PathLike, limit: int = JSON_LIMIT) -> Any:
    """Returns the value in a JSON file. Raises InputError as `read_text` does, and for other text."""
    return parse_json(read_text(path, limit), str(path))


def read_object(path: epath.PathLike) -> dict[str, Any]:
    """Returns the object in a JSON file. Raises InputError as `read_json` does, and for other values."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object")
    return content


def parse_json(text: str | bytes, what: str) -> Any:
    """Returns the value of a JSON text. Raises InputError, naming `what`, if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} is not JSON: {reason(error)}") from error


def json_text(value: Any, **how: Any) -> str:
    """Returns a value as JSON text. JSON has no NaN: numbers that are not finite become strings.

    Args:
      value: what to write.
      how: passed to `json.dumps`.
    """
    return json.dumps(_legal(value), allow_nan=False, **how)


def _legal(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _legal(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_legal(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
