"""Data sets in buckets, downloaded to this machine's disk before they are read, as rows need random access.

The copy stays there. The next start downloads only objects that have changed in the bucket.
"""

import contextlib
import json
from collections.abc import Collection
from pathlib import Path

from mora_jax.errors import InputError
from mora_jax.io import read_json
from train.console.progress import Bar
from train.data.rows import layout
from train.storage import buckets, lock
from train.storage.buckets import Object
from train.storage.files import write_whole

# Beside the copy: the version of each object in it.
_VERSIONS = "versions.json"


def staged(directory: str, splits: Collection[str] = layout.SPLITS) -> Path:
    """Returns the folder in which to read a data set: its own, or a copy on this machine's disk.

    Several processes may call this at once: one downloads, the others wait. Unchanged objects are not
    downloaded again, even after an interruption.

    Args:
      directory: the data set, in a folder or in a bucket.
      splits: those whose rows are needed.

    Raises:
      InputError: the bucket holds nothing there, or this disk has no room for it.
      OSError: the bucket cannot be reached.
    """
    if not buckets.in_bucket(directory):
        return Path(directory)
    place = buckets.stand_in("data", directory)
    waiting = f"{place.parent} is being filled by another process; waiting"
    with lock.wait_for_lock(place.parent / lock.LOCK, waiting):
        _download(directory, place, splits)
    return place


def _download(directory: str, place: Path, splits: Collection[str]) -> None:
    there = {name: found for name, found in buckets.objects(directory).items() if layout.belongs(name)}
    if not there:
        raise InputError(f"{directory} is empty: it holds no data set")
    current = _keep_current(place, there)
    left = {
        name: found
        for name, found in there.items()
        if name not in current and (layout.is_rows(name, splits) or not layout.is_rows(name))
    }
    size = sum(found.size for found in left.values())
    buckets.check_room(size, place)
    with Bar(f"downloading {directory}", size / 1e6, "MB") as bar:
        for name in buckets.download(directory, place, left, lambda n: bar.advance(n / 1e6)):
            if (place / name).stat().st_size != left[name].size:
                raise InputError(f"{directory}/{name} changed during the download; start again")
            current[name] = left[name]
            write_whole(place.parent / _VERSIONS, json.dumps(current))


def _keep_current(place: Path, there: dict[str, Object]) -> dict[str, Object]:
    """Returns the objects whose copies are up to date. Removes all other files of the copy."""
    versions: dict[str, Object] = {}
    with contextlib.suppress(InputError, TypeError, AttributeError):
        versions = {name: Object(*found) for name, found in read_json(place.parent / _VERSIONS).items()}
    here = buckets.files(place)
    same = {n: o for n, o in there.items() if versions.get(n) == o and here.get(n) == o.size}
    for name in here.keys() - same:
        (place / name).unlink()
    return same
