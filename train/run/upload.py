"""The files of a run that are appended to, which a bucket cannot hold while they grow.

An object cannot be appended to. So metrics.jsonl and TensorBoard's events of a run in a bucket are written on
this machine's disk, brought down from the bucket before, and taken up every so often as a whole: always
before a checkpoint is sealed, so that no line of an update that a checkpoint counts is ever lost.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
from etils import epath

from train.run.metrics import GROWING
from train.storage import buckets, lock

# Seconds between two times that files are taken up, and how many times longer than it takes.
EVERY = 30.0
_PAUSE = 20.0


class Mirror:
    """Where the files of a run that grow are written.

    Attributes:
      folder: on a disk.
    """

    def __init__(self, folder: Path, bucket: str = "") -> None:
        """Args:
        folder: on a disk.
        bucket: the folder in a bucket that it stands in for; empty for none.
        """
        self.folder = folder
        self._bucket = bucket
        self._taken: dict[Path, tuple[int, int]] = {}  # size and age of each file, as it is in the bucket
        self._one = threading.Lock()

    def bring_down(self) -> None:
        """Makes the stand-in what the bucket holds."""
        self.folder.mkdir(parents=True, exist_ok=True)
        there = [name for name in buckets.objects(self._bucket) if _grows(name)]
        for path in self._files():
            path.unlink()
        for name in buckets.download(self._bucket, self.folder, there, lambda n: None):
            self._taken[self.folder / name] = _state(self.folder / name)

    def take_up(self) -> None:
        """Writes to the bucket what is new. A file may grow meanwhile: a reader leaves half a line out."""
        if not self._bucket:
            return
        with self._one:
            for path in self._files():
                state = _state(path)
                if self._taken.get(path) != state:
                    name = path.relative_to(self.folder).as_posix()
                    with buckets.told(f"{self._bucket}/{name}"):
                        epath.Path(f"{self._bucket}/{name}").write_bytes(path.read_bytes())
                    self._taken[path] = state

    def _files(self) -> list[Path]:
        return [self.folder / name for name in buckets.files(self.folder) if _grows(name)]


@contextlib.contextmanager
def mirrored(run_dir: str) -> Iterator[Mirror]:
    """The place for a run's growing files: every so often, and at the end, they are in the run's folder.

    Only what process 0 holds is taken to a bucket, which alone writes such files; `lock.alone` must have
    the run.
    """
    if not buckets.in_bucket(run_dir) or jax.process_index() > 0:
        yield Mirror(Path(run_dir))
        return
    mirror, over = Mirror(lock.place(run_dir), run_dir), threading.Event()
    mirror.bring_down()
    thread = threading.Thread(target=_keep_up, args=(mirror, over), name="mirror", daemon=True)
    thread.start()
    try:
        yield mirror
    except BaseException:
        _end(thread, over)
        with contextlib.suppress(OSError):  # what was met first is what is told
            mirror.take_up()
        raise
    _end(thread, over)
    mirror.take_up()


def _keep_up(mirror: Mirror, over: threading.Event) -> None:
    pause = EVERY
    while not over.wait(pause):
        began = time.monotonic()
        with contextlib.suppress(OSError):  # a store out of reach is told of by the next checkpoint
            mirror.take_up()
        pause = max(EVERY, _PAUSE * (time.monotonic() - began))


def _end(thread: threading.Thread, over: threading.Event) -> None:
    over.set()
    thread.join()


def _grows(name: str) -> bool:
    return name.partition("/")[0] in GROWING


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
