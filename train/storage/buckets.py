"""Folders in object stores, gs:// and s3://, and the folders on this machine's disk that stand in for them.

A bucket has no folders, no renames, no appending and no locks. An object is written completely or not at all.
Small files are read and written through `etils.epath`. This module has what epath lacks: whole folders, and
versions of objects. Both reach the stores through fsspec.
"""

import concurrent.futures
import contextlib
import datetime
import errno
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import fsspec.config
from etils import epath
from fsspec.callbacks import Callback

from mora_jax.errors import InputError, reason

# Scheme -> the package that fsspec reaches it with.
STORES = {"gs": "gcsfs", "s3": "s3fs"}
CACHE = "MORA_CACHE"
# Concurrent transfers.
_TRANSFERS = 8
# The fields of an object's description that change whenever its content does.
_VERSIONS = ("generation", "ETag", "mtime", "created")
# Packages whose errors, none of which is an OSError, concern a store or the way there.
_CLIENTS = ("aiobotocore", "aiohttp", "botocore", "gcsfs", "google", "requests", "s3fs", "urllib3")

Advance = Callable[[float], None]


class Object(NamedTuple):
    """What a store says of an object.

    Attributes:
      size: bytes.
      version: changes whenever the content does.
    """

    size: int
    version: str


def configure() -> None:
    """Sets up fsspec for this process; must be called before a bucket is used. May be called again."""
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs pages about errors that it also raises
    # A cached listing would miss what TensorStore and other processes write.
    for scheme in ("gs", "gcs", "s3"):
        fsspec.config.conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)


def in_bucket(path: Any) -> bool:
    """Whether a path is in an object store."""
    return "://" in str(path)


def cache_folder() -> Path:
    """Returns the folder on this machine's disk for copies of buckets: MORA_CACHE, or the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get(CACHE) or f"{home}/mora_jax").expanduser().absolute()


def stand_in(kind: str, path: str) -> Path:
    """Returns the folder on this machine's disk that stands in for one in a bucket, with the same name.

    Args:
      kind: the purpose: two kinds never share a folder.
      path: the folder in a bucket.
    """
    place = str(epath.Path(path))
    return cache_folder() / kind / hashlib.sha256(place.encode()).hexdigest()[:12] / epath.Path(path).name


def objects(folder: epath.PathLike) -> dict[str, Object]:
    """Returns all objects below a folder by their relative names. A missing folder has none.

    Raises:
      InputError: if the bucket does not exist, or may not be listed.
      OSError: if the store is out of reach.
    """
    place = str(folder)
    try:
        with store_errors(place):
            store = _store(place)
            root = store._strip_protocol(place).rstrip("/") + "/"
            found = store.find(place, detail=True)
    except (FileNotFoundError, PermissionError) as error:
        raise InputError(f"{place} cannot be listed: {error.strerror}") from error
    return {
        name.removeprefix(root): _object(facts)
        for name, facts in found.items()
        if name.startswith(root) and not name.endswith("/") and facts["type"] == "file"
    }


def modified(path: epath.Path) -> datetime.datetime:
    """Returns when a file or an object was written."""
    if not in_bucket(path):
        return datetime.datetime.fromtimestamp(path.stat().mtime).astimezone()
    with store_errors(str(path)):
        return _store(str(path)).modified(str(path))


def download(folder: str, local: Path, names: Iterable[str], advance: Advance) -> Iterator[str]:
    """Downloads objects of a folder, several at once. Each file appears only when it is complete.

    Args:
      folder: in a bucket.
      local: the folder to write to.
      names: what to copy, relative to both.
      advance: called with the number of bytes of each part that arrived.

    Yields:
      Each name, once its file is complete.
    """
    store = _store(folder)

    def get(name: str) -> str:
        target = local / name
        part = target.with_name(f"{target.name}.part")
        target.parent.mkdir(parents=True, exist_ok=True)
        with store_errors(f"{folder}/{name}"):
            store.get_file(f"{folder}/{name}", str(part), callback=_Counting(advance))
        part.replace(target)
        return name

    yield from _concurrently(get, names)


def upload(local: Path, folder: str, names: Iterable[str], advance: Advance) -> None:
    """Uploads files into a folder of a bucket, several at once, and compares their sizes there.

    Raises:
      OSError: naming an object that is not there as it was written.
    """
    store, names = _store(folder), list(names)

    def put(name: str) -> str:
        with store_errors(f"{folder}/{name}"):
            store.put_file(str(local / name), f"{folder}/{name}", callback=_Counting(advance))
        return name

    for _ in _concurrently(put, names):
        pass
    there = objects(folder)
    for name in names:
        if name not in there or there[name].size != (local / name).stat().st_size:
            raise OSError(errno.EIO, "was not stored as it was uploaded", f"{folder}/{name}")


def files(local: Path) -> dict[str, int]:
    """Returns the sizes in bytes of all files below a folder on a disk, by their relative names."""
    found = (path for path in local.rglob("*") if path.is_file())
    return {path.relative_to(local).as_posix(): path.stat().st_size for path in found}


def check_room(needed: int, folder: Path) -> None:
    """Raises InputError if a disk has fewer bytes left than are needed."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{folder} has room for {free / 1e9:.1f} GB, but {needed / 1e9:.1f} GB are needed; free some, or "
            f"set {CACHE} to a folder on another disk"
        )


@contextlib.contextmanager
def store_errors(place: str) -> Iterator[None]:
    """Turns errors of the packages into OSErrors that name the place, a missing package into InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        line = describe_error(error) or reason(error)
        if isinstance(error, ImportError):
            raise InputError(line) from error
        kind = type(error) if isinstance(error, FileNotFoundError | PermissionError) else OSError
        raise kind(getattr(error, "errno", None) or errno.EIO, line, place) from error


def describe_error(error: BaseException) -> str | None:
    """Returns an error of a store's package as one line, None if it is not one."""
    missing = getattr(error.__cause__, "name", None) if isinstance(error, ImportError) else None
    if missing in STORES.values():
        return f"gs:// and s3:// need the package {missing}: pip install 'mora_jax[cloud]'"
    if isinstance(error, OSError) or type(error).__module__.partition(".")[0] not in _CLIENTS:
        return None
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _object(facts: dict[str, Any]) -> Object:
    version = next((str(facts[name]) for name in _VERSIONS if facts.get(name) is not None), "")
    return Object(facts["size"], version)


def _store(path: str) -> Any:
    configure()
    return fsspec.filesystem(path.partition("://")[0])


def _concurrently(work: Callable[[str], str], names: Iterable[str]) -> Iterator[str]:
    with concurrent.futures.ThreadPoolExecutor(_TRANSFERS, "transfer") as pool:
        futures = [pool.submit(work, name) for name in names]
        try:
            for done in concurrent.futures.as_completed(futures):
                yield done.result()
        finally:
            for waiting in futures:
                waiting.cancel()


class _Counting(Callback):
    """Passes on how many more bytes a transfer has done, however the store counts them."""

    def __init__(self, advance: Advance) -> None:
        super().__init__()
        self._advance = advance

    def relative_update(self, inc: int = 1) -> None:
        self._advance(inc)
        super().relative_update(inc)

    def absolute_update(self, value: int) -> None:
        self._advance(value - self.value)
        super().absolute_update(value)
