"""Log files of a run in a bucket.

An object cannot be appended to. So metrics.jsonl and TensorBoard's events of a run in a bucket are downloaded
to this machine's disk, written there, and uploaded periodically: always before a checkpoint is sealed, so
that no line of an update that a checkpoint counts is lost.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
from etils import epath

from train.run.metrics import LINES, LOG_FILES
from train.storage import buckets, lock

# Seconds between two uploads, and how many times longer than an upload the pause is.
EVERY = 30.0
_PAUSE = 20.0


class Upload:
    """The folder that a run's log files are written to, and their upload.

    Attributes:
      log_dir: the folder, on a disk.
    """

    def __init__(self, log_dir: Path, bucket: str = "") -> None:
        """Args:
        log_dir: the folder, on a disk.
        bucket: the run's folder in a bucket; empty if the run is on a disk.
        """
        self.log_dir = log_dir
        self._bucket = bucket
        self._uploaded: dict[Path, tuple[int, int]] = {}  # size and time of each file as uploaded
        self._lock = threading.Lock()

    def download(self) -> None:
        """Replaces the log files on the disk by those in the bucket."""
        self.log_dir.mkdir(parents=True, exist_ok=True)
        names = [name for name in buckets.objects(self._bucket) if _is_log(name)]
        for path in self._files():
            path.unlink()
        for name in buckets.download(self._bucket, self.log_dir, names, lambda n: None):
            self._uploaded[self.log_dir / name] = _state(self.log_dir / name)

    def upload(self) -> None:
        """Uploads changed files. A file may grow meanwhile: a reader ignores half a line at its end."""
        if not self._bucket:
            return
        with self._lock:
            for path in self._files():
                state = _state(path)
                if self._uploaded.get(path) != state:
                    name = path.relative_to(self.log_dir).as_posix()
                    with buckets.store_errors(f"{self._bucket}/{name}"):
                        epath.Path(f"{self._bucket}/{name}").write_bytes(path.read_bytes())
                    self._uploaded[path] = state

    def _files(self) -> list[Path]:
        return [self.log_dir / name for name in buckets.files(self.log_dir) if _is_log(name)]


@contextlib.contextmanager
def uploading(run_dir: str) -> Iterator[Upload]:
    """Uploads a run's log files to its bucket, periodically and at the end. Does nothing for a disk.

    Only process 0 writes log files and uploads them. It must hold `lock.lock_run`.
    """
    if not buckets.in_bucket(run_dir) or jax.process_index() > 0:
        yield Upload(Path(run_dir))
        return
    upload, finished = Upload(lock.local_folder(run_dir), run_dir), threading.Event()
    upload.download()
    thread = threading.Thread(target=_repeat, args=(upload, finished), name="upload", daemon=True)
    thread.start()
    try:
        yield upload
    except BaseException:
        finished.set()
        thread.join()
        with contextlib.suppress(OSError):  # the first error is the one to report
            upload.upload()
        raise
    finished.set()
    thread.join()
    upload.upload()


def newest_log(run_dir: str) -> str:
    """Returns the metrics.jsonl of a run that may be training.

    That of a run in a bucket may be more recent on this machine's disk, if the run trains here.
    """
    there, here = epath.Path(run_dir) / LINES, lock.local_folder(run_dir) / LINES
    if not buckets.in_bucket(run_dir) or not here.exists():
        return str(there)
    uploaded = buckets.objects(run_dir).get(LINES)
    return str(here) if uploaded is None or here.stat().st_size > uploaded.size else str(there)


def _repeat(upload: Upload, finished: threading.Event) -> None:
    pause = EVERY
    while not finished.wait(pause):
        started = time.monotonic()
        with contextlib.suppress(OSError):  # the next checkpoint reports a store that is out of reach
            upload.upload()
        pause = max(EVERY, _PAUSE * (time.monotonic() - started))


def _is_log(name: str) -> bool:
    return name.partition("/")[0] in LOG_FILES


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
