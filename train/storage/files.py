"""Small files that are there whole or not at all, and what it means where nothing can be written."""

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Any

from etils import epath

from mora_jax.errors import InputError
from train.console.exits import naming
from train.storage.buckets import in_bucket, told

# What some mounted file systems answer where they cannot sync.
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP)
# The same command will fail again; anything else, such as a full disk, may be mended beside it.
_BAD_PLACES = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)


def write_whole(path: epath.PathLike, content: str | bytes) -> None:
    """Writes a file or replaces one: a kill or a loss of power leaves the old one or the new one.

    Raises:
      OSError: naming the file, which is then as it was.
    """
    path, data = epath.Path(path), content.encode() if isinstance(content, str) else content
    if in_bucket(path):  # an object is put whole or not at all
        with told(str(path)):
            path.write_bytes(data)
        return
    part = path.parent / f"{path.name}.part"
    with naming(part):
        part.write_bytes(data)
        sync(part)
        part.replace(path)
        sync(path.parent)


def make_folder(path: epath.PathLike) -> None:
    """Makes a folder and those above it. In a bucket there are none; a bucket that is missing is not made."""
    if not in_bucket(path):
        epath.Path(path).mkdir(parents=True, exist_ok=True)


def sync(path: epath.PathLike) -> None:
    """Brings a file or folder onto the disk, where it outlives a loss of power; remote stores see to it."""
    if in_bucket(path):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writable(path: Any, refusal: str) -> Iterator[None]:
    """Tells a place that cannot be written to from a disk in trouble.

    Raises:
      InputError: `refusal` and the reason, for a place where the same command will fail again.
      OSError: naming `path`, for anything else.
    """
    with naming(path):
        try:
            yield
        except OSError as error:
            if error.errno in _BAD_PLACES:
                raise InputError(f"{refusal}: {error.strerror}") from error
            raise
