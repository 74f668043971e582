"""A fake object store on a disk that replaces s3:// in tests. It has no folders, no renames and no appending.

fsspec reaches it like a real store. `python fake_store.py ARGS` runs the `mora` command with it.
"""

import datetime
import io
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
from etils.epath import backend

ROOT = "FAKE_STORE"


class FakeStore(fsspec.AbstractFileSystem):
    """An object is a file below the folder that FAKE_STORE names. A bucket is a folder in it."""

    protocol = "s3"
    cachable = False

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list:
        folder = _place(self._strip_protocol(path))
        if folder.is_file():
            return [self.info(path)]
        below = sorted(p for p in folder.glob("*") if p.is_file() or any(_objects(p)))
        if not below:
            raise FileNotFoundError(path)
        infos = [self.info(p.relative_to(_place("")).as_posix()) for p in below]
        return infos if detail else [each["name"] for each in infos]

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        name = self._strip_protocol(path)
        place = _place(name)
        if place.is_file():
            status = place.stat()
            version = f"{status.st_mtime_ns}-{status.st_ino}"
            return {"name": name, "type": "file", "size": status.st_size, "ETag": version}
        if any(_objects(place)):
            return {"name": name, "type": "directory", "size": 0}
        raise FileNotFoundError(path)

    def modified(self, path: str) -> datetime.datetime:
        written = _place(self._strip_protocol(path)).stat().st_mtime
        return datetime.datetime.fromtimestamp(written).astimezone()

    def mkdir(self, path: str, create_parents: bool = True, **kwargs: Any) -> None:
        bucket = _place(self._strip_protocol(path).partition("/")[0])
        assert bucket.is_dir(), f"{path}: a real store would create a bucket"

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self.mkdir(path)

    def mv(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"{args}: a store cannot rename")

    def _rm(self, path: str) -> None:
        place = _place(path)
        if not place.is_dir():  # a folder is not an object
            place.unlink()

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        place = _place(path)
        if mode == "rb":
            if not place.is_file():
                raise FileNotFoundError(path)  # without errno and message, as in s3fs
            return place.open("rb")
        assert mode == "wb", f"{path}: {mode}: an object is written as a whole"
        bucket = _place(path.partition("/")[0])
        if not bucket.is_dir():
            raise FileNotFoundError(f"there is no bucket {bucket.name}")
        return _Object(place)


class _Object(io.BytesIO):
    """An object that is being written. It appears as a whole when it is closed."""

    def __init__(self, place: Path) -> None:
        super().__init__()
        self._place = place

    def close(self) -> None:
        if not self.closed:
            handle, part = tempfile.mkstemp(dir=f"{os.environ[ROOT]}.parts")
            with os.fdopen(handle, "wb") as file:
                file.write(self.getvalue())
            self._place.parent.mkdir(parents=True, exist_ok=True)
            Path(part).replace(self._place)
        super().close()


def install(root: Path) -> None:
    """Replaces s3:// by the store, with one bucket named `bucket`."""
    os.environ[ROOT] = str(root)
    (root / "bucket").mkdir(parents=True, exist_ok=True)
    Path(f"{root}.parts").mkdir(exist_ok=True)
    fsspec.register_implementation("s3", FakeStore, clobber=True)
    backend.fsspec_backend._get_filesystem.cache_clear()


def _place(name: str) -> Path:
    return Path(os.environ[ROOT]) / name


def _objects(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    from train.cli.main import main

    install(Path(os.environ[ROOT]))
    main(sys.argv[1:])
