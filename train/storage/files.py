"""Files that are written completely or not at all, and what their errors mean."""

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from mora_jax.errors import InputError
from train.storage.buckets import in_bucket, store_errors

# What some mounted file systems answer if they cannot sync.
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP)
# The same command will fail again. Any other error, such as a full disk, may be mended meanwhile.
_BAD_PLACES = (
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP),
)
_CHUNK = 1 << 22


def write_whole(path: epath.PathLike, content: str | bytes) -> None:
    """Writes or replaces a file: a kill or a power failure leaves the old file or the new one.

    Raises:
      OSError: naming the file, which is unchanged.
    """
    path, data = epath.Path(path), content.encode() if isinstance(content, str) else content
    if in_bucket(path):  # an object is written completely or not at all
        with store_errors(str(path)):
            path.write_bytes(data)
        return
    part = path.parent / f"{path.name}.part"
    with naming_errors(part):
        part.write_bytes(data)
        sync(part)
        part.replace(path)
        sync(path.parent)


def make_folder(path: epath.PathLike) -> None:
    """Makes a folder and its parents. A bucket has no folders, and a missing bucket is not made."""
    if not in_bucket(path):
        epath.Path(path).mkdir(parents=True, exist_ok=True)


def sync(path: epath.PathLike) -> None:
    """Syncs a file or folder to the disk, so that it survives a power failure. Does nothing in a bucket."""
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


def sha256(path: epath.PathLike, advance: Callable[[float], None] = lambda n: None) -> str:
    """Returns the SHA-256 of a file's content in hexadecimal.

    Args:
      path: the file.
      advance: called with the number of bytes of each chunk that was hashed.
    """
    digest = hashlib.sha256()
    with epath.Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


@contextlib.contextmanager
def naming_errors(path: Any) -> Iterator[None]:
    """Adds the path to an OSError raised inside. The system names no file once it is open."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def is_bad_place(error: OSError) -> bool:
    """Returns whether an error means that the same command will fail again, unlike a full disk."""
    return error.errno in _BAD_PLACES


@contextlib.contextmanager
def writable(path: Any, refusal: str) -> Iterator[None]:
    """Separates a place that cannot be written to from a disk in trouble.

    Raises:
      InputError: `refusal` and the reason, if the same command will fail again.
      OSError: naming `path`, for any other error.
    """
    with naming_errors(path):
        try:
            yield
        except OSError as error:
            if is_bad_place(error):
                raise InputError(f"{refusal}: {error.strerror}") from error
            raise
