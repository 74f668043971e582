"""Folders in object stores, gs:// and s3://, and the disk of this machine that stands in for them.

A bucket has no folders, no renames, no appending and no locks; an object is put in one piece or not at all.
Small files are read and written through `etils.epath`. What epath cannot do is here: whole folders, and what
tells one version of an object from another. Both reach the stores through fsspec.
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

from mora_jax.errors import InputError

# Scheme -> the package that fsspec reaches it with.
STORES = {"gs": "gcsfs", "s3": "s3fs"}
CACHE = "MORA_CACHE"
# Files under way at once.
_TRANSFERS = 8
# What in an object's description changes whenever its content does.
_VERSIONS = ("generation", "ETag", "mtime", "created")
# Packages whose errors, none of which is an OSError, tell of a store or of the way there.
_CLIENTS = ("aiobotocore", "aiohttp", "botocore", "gcsfs", "google", "requests", "s3fs", "urllib3")

Advance = Callable[[float], None]

logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs pages of what it raises as well
# Listings that are kept would miss what TensorStore and other processes write.
for _scheme in ("gs", "gcs", "s3"):
    fsspec.config.conf.setdefault(_scheme, {}).setdefault("use_listings_cache", False)


class Object(NamedTuple):
    """What a store says of an object.

    Attributes:
      size: bytes.
      version: changes whenever the content does.
    """

    size: int
    version: str


def in_bucket(path: Any) -> bool:
    """Whether a path leads into an object store."""
    return "://" in str(path)


def reachable(name: str, path: str) -> None:
    """Raises InputError for a place in a store that is not known; `name` is what the place is for."""
    scheme, found, _ = path.partition("://")
    if found and scheme not in STORES:
        raise InputError(f"{name} {path} must be a folder, or one in a bucket of gs:// or s3://")


def cache_folder() -> Path:
    """Where what lies in buckets is kept on this machine's disk: MORA_CACHE, or the user's own cache."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get(CACHE) or f"{home}/mora_jax").expanduser().absolute()


def stand_in(kind: str, path: str) -> Path:
    """The folder on this machine's disk that stands for one in a bucket; of the same name, and its own.

    Args:
      kind: what it is for: two kinds never share a folder.
      path: the folder in a bucket.
    """
    place = str(epath.Path(path))
    return cache_folder() / kind / hashlib.sha256(place.encode()).hexdigest()[:12] / epath.Path(path).name


def objects(folder: epath.PathLike) -> dict[str, Object]:
    """Every object below a folder, by its name relative to it; none where there is no such folder.

    Raises:
      InputError: if there is no such bucket, or no right to look into it.
      OSError: if the store is out of reach.
    """
    place = str(folder)
    try:
        with told(place):
            store = _store(place)
            root = store._strip_protocol(place).rstrip("/") + "/"
            found = store.find(place, detail=True)
    except (FileNotFoundError, PermissionError) as error:
        raise InputError(f"{place} cannot be looked into: {error.strerror}") from error
    return {
        name.removeprefix(root): _object(facts)
        for name, facts in found.items()
        if name.startswith(root) and not name.endswith("/") and facts["type"] == "file"
    }


def modified(path: epath.Path) -> datetime.datetime:
    """When a file or an object was written."""
    if not in_bucket(path):
        return datetime.datetime.fromtimestamp(path.stat().mtime).astimezone()
    with told(str(path)):
        return _store(str(path)).modified(str(path))


def download(folder: str, local: Path, names: Iterable[str], advance: Advance) -> Iterator[str]:
    """Copies objects of a folder to the disk, several at once, each there whole or not at all.

    Args:
      folder: in a bucket.
      local: the folder to copy into.
      names: what to copy, relative to both.
      advance: told of every so many bytes.

    Yields:
      Each name, once it is there.
    """
    store = _store(folder)

    def bring(name: str) -> str:
        target = local / name
        part = target.with_name(f"{target.name}.part")
        target.parent.mkdir(parents=True, exist_ok=True)
        with told(f"{folder}/{name}"):
            store.get_file(f"{folder}/{name}", str(part), callback=_Counting(advance))
        part.replace(target)
        return name

    yield from _at_once(bring, names)


def upload(local: Path, folder: str, names: Iterable[str], advance: Advance) -> None:
    """Copies files of the disk into a folder of a bucket, several at once, and compares the sizes there.

    Raises:
      OSError: for what is not there as it should be.
    """
    store, names = _store(folder), list(names)

    def put(name: str) -> str:
        with told(f"{folder}/{name}"):
            store.put_file(str(local / name), f"{folder}/{name}", callback=_Counting(advance))
        return name

    for _ in _at_once(put, names):
        pass
    there = objects(folder)
    for name in names:
        if name not in there or there[name].size != (local / name).stat().st_size:
            raise OSError(errno.EIO, "is not there as it was written", f"{folder}/{name}")


def files(local: Path) -> dict[str, int]:
    """Every file below a folder of the disk, by its name relative to it, and its bytes."""
    found = (path for path in local.rglob("*") if path.is_file())
    return {path.relative_to(local).as_posix(): path.stat().st_size for path in found}


def check_room(needed: int, folder: Path) -> None:
    """Raises InputError where a disk has fewer bytes left than are needed."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{folder} has room for {free / 1e9:.1f} GB, and {needed / 1e9:.1f} GB are needed; make room, or "
            f"name a folder of another disk in {CACHE}"
        )


@contextlib.contextmanager
def told(place: str) -> Iterator[None]:
    """Turns errors of the packages into OSErrors that name the place; a missing package is an InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        said = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        line = trouble(error) or said
        if isinstance(error, ImportError):
            raise InputError(line) from error
        kind = type(error) if isinstance(error, FileNotFoundError | PermissionError) else OSError
        raise kind(getattr(error, "errno", None) or errno.EIO, line, place) from error


def trouble(error: BaseException) -> str | None:
    """What an error of the packages says, in one line; None for one that is none of theirs."""
    missing = getattr(error.__cause__, "name", None) if isinstance(error, ImportError) else None
    if missing in STORES.values():
        return f"gs:// and s3:// need more packages, {missing} is missing: pip install 'mora_jax[cloud]'"
    if isinstance(error, OSError) or type(error).__module__.partition(".")[0] not in _CLIENTS:
        return None
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _object(facts: dict[str, Any]) -> Object:
    version = next((str(facts[name]) for name in _VERSIONS if facts.get(name) is not None), "")
    return Object(facts["size"], version)


def _store(path: str) -> Any:
    return fsspec.filesystem(path.partition("://")[0])


def _at_once(work: Callable[[str], str], names: Iterable[str]) -> Iterator[str]:
    with concurrent.futures.ThreadPoolExecutor(_TRANSFERS, "transfer") as pool:
        under_way = [pool.submit(work, name) for name in names]
        try:
            for done in concurrent.futures.as_completed(under_way):
                yield done.result()
        finally:
            for waiting in under_way:
                waiting.cancel()


class _Counting(Callback):
    """Passes on how many bytes more a transfer has done, however the store counts them."""

    def __init__(self, advance: Advance) -> None:
        super().__init__()
        self._advance = advance

    def relative_update(self, inc: int = 1) -> None:
        self._advance(inc)
        super().relative_update(inc)

    def absolute_update(self, value: int) -> None:
        self._advance(value - self.value)
        super().absolute_update(value)
