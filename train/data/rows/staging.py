"""Data sets in buckets, copied to this machine's disk before they are read: rows are read at random.

The copy stays there for the next start, which fetches only what the bucket has otherwise by then.
"""

import contextlib
import fcntl
import json
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

from mora_jax.errors import InputError
from mora_jax.io import read_json
from train.console.progress import Bar
from train.data.rows import layout
from train.storage import buckets
from train.storage.buckets import Object
from train.storage.files import write_whole

# Beside the copy: the version of each object in it.
_VERSIONS = "versions.json"
_LOCK = "lock"


def staged(directory: str, splits: Collection[str] = layout.SPLITS) -> Path:
    """Where a data set can be read: its own folder, or a copy on this machine's disk of one in a bucket.

    Several processes may ask at once: one copies, the others wait. What was copied before and is the same
    in the bucket is not copied again, also after an interruption.

    Args:
      directory: the data set.
      splits: those whose rows are needed.

    Raises:
      InputError: if there is nothing in the bucket, or no room for it here.
      OSError: if the bucket is out of reach.
    """
    if not buckets.in_bucket(directory):
        return Path(directory)
    place = buckets.stand_in("data", directory)
    with _alone(place.parent):
        _bring(directory, place, splits)
    return place


def _bring(directory: str, place: Path, splits: Collection[str]) -> None:
    there = {name: found for name, found in buckets.objects(directory).items() if "/" not in name}
    if not there:
        raise InputError(f"{directory} holds no data set: there is nothing in it")
    known = _known(place, there)
    left = {
        name: found
        for name, found in there.items()
        if name not in known and (layout.is_rows(name, splits) or not layout.is_rows(name))
    }
    size = sum(found.size for found in left.values())
    buckets.check_room(size, place)
    with Bar(f"copying {directory}", size / 1e6, "MB") as bar:
        for name in buckets.download(directory, place, left, lambda n: bar.advance(n / 1e6)):
            if (place / name).stat().st_size != left[name].size:
                raise InputError(f"{directory}/{name} changed while it was copied; start again")
            known[name] = left[name]
            write_whole(place.parent / _VERSIONS, json.dumps(known))


def _known(place: Path, there: dict[str, Object]) -> dict[str, Object]:
    """What of the copy is as it is in the bucket; the rest of it is removed."""
    versions: dict[str, Object] = {}
    with contextlib.suppress(InputError, TypeError, AttributeError):
        versions = {name: Object(*found) for name, found in read_json(place.parent / _VERSIONS).items()}
    here = buckets.files(place)
    same = {n: o for n, o in there.items() if versions.get(n) == o and here.get(n) == o.size}
    for name in here.keys() - same:
        (place / name).unlink()
    return same


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("ab") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            print(f"mora: {folder} is being filled by another process; waiting", file=sys.stderr, flush=True)
            fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError as error:  # a file system without locks
            print(
                f"mora: warning: {folder} cannot be locked: {error.strerror}; no other process of this "
                "machine may fill it",
                file=sys.stderr,
                flush=True,
            )
        yield
