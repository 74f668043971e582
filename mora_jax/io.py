"""Small files that others wrote: read whole, but only plain files, and no more bytes than such a file has."""

import json
from pathlib import Path
from typing import Any

from etils import epath

from mora_jax.errors import InputError, reason

# Far more than any config or index of tensors takes.
JSON_LIMIT = 1 << 24


def read_bytes(path: epath.PathLike, limit: int) -> bytes:
    """The content of a file.

    Raises:
      InputError: if there is none, it is no plain file (a pipe, a device), has more than `limit` bytes, or
        cannot be read.
    """
    file = epath.Path(path)
    try:
        if not file.exists():
            raise InputError(f"{file} is missing")
        if not is_plain_file(file):
            raise InputError(f"{file} is no plain file")
        size = file.stat().length
        if size > limit:
            raise InputError(f"{file}: it has {size:,} bytes, and at most {limit:,} are read")
        with file.open("rb") as stream:
            return stream.read(size)  # asked for more, Python would take memory for it
    except InputError:
        raise
    except (OSError, ImportError, ValueError) as error:  # an unknown file system, or a name that is none
        raise InputError(f"{str(path)!r} cannot be read: {reason(error)}") from error


def is_plain_file(file: epath.Path) -> bool:
    """Whether there is a file that can be read to its end: no folder, no pipe, no device."""
    return file.exists() and not file.is_dir() if "://" in str(file) else Path(file).is_file()


def read_text(path: epath.PathLike, limit: int) -> str:
    """The content of a UTF-8 file. Raises InputError as `read_bytes` does, and for other text."""
    try:
        return read_bytes(path, limit).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: it is not UTF-8 text") from error


def read_json(path: epath.PathLike, limit: int = JSON_LIMIT) -> Any:
    """The content of a JSON file. Raises InputError as `read_text` does, and for what is not JSON."""
    return parse_json(read_text(path, limit), str(path))


def read_object(path: epath.PathLike) -> dict[str, Any]:
    """Returns the object of a JSON file. Raises InputError as `read_json` does, and for other values."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object")
    return content


def parse_json(text: str | bytes, what: str) -> Any:
    """What a JSON text says. Raises InputError, naming `what`, for what is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} is not JSON: {reason(error)}") from error
