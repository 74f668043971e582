"""Files that are written completely or not at all, and what their errors mean."""

import contextlib
import errno
import hashlib
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from etils import epath

from mora_jax.errors import InputError, reason
from train.storage.buckets import in_bucket, store_errors

# What some mounted file systems answer if they cannot sync.
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP)
# The same command will fail again. Any other error, such as a full disk, may be mended meanwhile.
_BAD_PLACES = (
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP),
)
_CHUNK = 1 << 22
# Files that `write_whole` has not finished: no user gives a file such a name.
_PART = re.compile(r".+\.[0-9a-f]{16}\.part")


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
    part = path.parent / f"{path.name}.{secrets.token_hex(8)}.part"
    with naming_errors(path):
        try:
            with Path(part).open("xb") as file:  # a new file, and never what a link leads to
                file.write(data)
            sync(part)
            Path(part).replace(path)  # epath's error has no number
        finally:
            part.unlink(missing_ok=True)
        sync(path.parent)


def write_result(path: epath.PathLike, content: str | bytes) -> None:
    """Writes a file as `write_whole` does, and makes its folder."""
    make_folder(epath.Path(path).parent)
    write_whole(path, content)


def is_part(name: str) -> bool:
    """Returns whether a file of this name is one that `write_whole` has not finished."""
    return bool(_PART.fullmatch(name))


def remove_parts(folder: epath.PathLike, name: str = "") -> None:
    """Removes what killed calls of `write_whole` left in a folder. No other program may be writing there.

    Args:
      folder: the folder.
      name: the file that these calls wrote; empty for any.
    """
    if in_bucket(folder) or not epath.Path(folder).is_dir():
        return
    for path in epath.Path(folder).iterdir():
        if is_part(path.name) and path.name.startswith(name and f"{name}."):
            path.unlink(missing_ok=True)


def check_free(path: epath.PathLike, flag: str, overwrite: bool, suffix: str = "") -> None:
    """Raises InputError if a result would replace something, or cannot be written.

    It would replace a folder, or a file without `overwrite`. Found before the work that makes the result.

    Args:
      path: the file to write; empty for none.
      flag: the flag that names it, such as "--out".
      overwrite: whether a file in its place is replaced.
      suffix: what its name ends in, such as ".png".
    """
    if not os.fspath(path):
        return
    if not os.fspath(path).endswith(suffix):
        raise InputError(f"{flag} {path} must end in {suffix}")
    place = epath.Path(path)
    if place.is_dir():
        raise InputError(f"{flag} {path} is a folder; name the file to write")
    if not overwrite and (place.exists() if in_bucket(path) else os.path.lexists(path)):
        raise InputError(
            f"{flag} {path} exists already; choose another name, or add --overwrite to replace it"
        )
    if in_bucket(path):
        return
    folder = next(parent for parent in Path(path).absolute().parents if parent.exists())
    if not os.access(folder, os.W_OK):
        raise InputError(f"{flag} {path}: nothing can be written to {folder}")


def open_own(path: Path, mode: str) -> Any:
    """Opens a file that this program keeps, to write to it, without a buffer. A link is not followed.

    Raises:
      InputError: if there is a link in its place, which may lead to a file of somebody else, or a pipe.
      OSError: if it cannot be opened.
    """

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW, 0o666)

    if path.is_symlink():
        raise InputError(f"{path} is a link, and may lead to a file of somebody else; remove it")
    if path.exists() and not (path.is_file() or path.is_dir()):  # opening a pipe waits for its other end
        raise InputError(f"{path} is not a regular file; remove it")
    return open(path, mode, buffering=0, opener=opener)


def refuse_links(folder: Path, names: Iterable[str]) -> None:
    """Raises InputError if one of the named folders, which a program fills, is a link to another place."""
    for name in names:
        if (folder / name).is_symlink():
            raise InputError(
                f"{folder / name} is a link, and may lead to files of somebody else; put a folder there"
            )


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
        raise OSError(error.errno, reason(error), str(path)) from error


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
