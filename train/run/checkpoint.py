"""Checkpoints, written by orbax in the background and each sealed by a manifest.

A checkpoint is a folder `<directory>/<step>` with orbax's files and `manifest.json`. The manifest is written
last. It holds the size and hash of every file, what was saved beside the arrays, and a hash of itself. A
folder without a manifest is an unfinished save and is never loaded.
"""

import concurrent.futures
import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from mora_jax.errors import InputError, some
from train.console.progress import progress
from train.run import manifest
from train.run.arrays import check_restorable
from train.run.manifest import MANIFEST, Advance, Json
from train.runtime.memory import exhausted
from train.runtime.workarounds import (
    end_failed_save,
    ignore_closed_loops,
    take_folders_literally,
    without_logged_tracebacks,
)
from train.storage import buckets
from train.storage.files import make_folder

# Part of the name of the folder that orbax writes to before it moves it into place.
_UNFINISHED = "orbax-checkpoint-tmp"
_LARGEST_STEP = 2**31 - 1
# Where orbax cannot write: a checkpoint is saved on this machine's disk and uploaded, and downloaded to be
# read.
_UPLOADED = "s3://"


class SaveError(OSError):
    """A checkpoint could not be saved, for instance on a full disk. Earlier ones are untouched."""


class Checkpoints:
    """The checkpoints of one run. Leaving the context waits for the current save.

    Every process must call every method. Nothing is written or removed before the first `save` or
    `remove_unfinished`, so a run's checkpoints can be read while it trains.

    Orbax's own checkpoint manager is not used: it would count a folder that is not yet sealed as complete,
    and remove older checkpoints for it.
    """

    def __init__(
        self,
        directory: str,
        keep: int | None = None,
        keep_every: int = 0,
        before_sealing: Callable[[], None] = lambda: None,
    ) -> None:
        """Args:
          directory: the folder of the checkpoints, on a disk or in a bucket. The first save makes it.
          keep: how many of the newest are kept; None for all.
          keep_every: checkpoints of steps that this divides are kept too; 0 for none.
          before_sealing: called in the background on process 0, when a checkpoint is complete but for its
            manifest.

        Raises:
          InputError: if none is to be kept, the directory is not a folder, or several processes are to
            write to s3://.
        """
        if keep is not None and keep < 1:
            raise InputError(f"at least 1 checkpoint must be kept, not {keep}")
        buckets.configure()
        take_folders_literally()
        ignore_closed_loops()
        bucket = buckets.in_bucket(directory)
        # Orbax requires absolute paths.
        self._directory = epath.Path(directory if bucket else Path(directory).absolute())
        if not bucket and os.path.lexists(directory) and not Path(directory).is_dir():
            raise InputError(f"{directory} is not a folder; remove it")
        self._uploaded = directory.startswith(_UPLOADED)
        if self._uploaded and jax.process_count() > 1:
            raise InputError(
                f"{directory}: several processes cannot write checkpoints to {_UPLOADED}; use gs:// or a "
                "disk that they share"
            )
        self._before_sealing = before_sealing
        self._keep = keep
        self._keep_every = keep_every
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None
        self._damaged: set[int] = set()  # found by `latest_good`

    def save(self, step: int, state: Any, meta: Json) -> None:
        """Saves in the background, after the previous save is done. Never skips a save.

        When it returns, the arrays have been copied and may be donated. An existing checkpoint of the step is
        replaced.

        Args:
          step: the number of the checkpoint, at least 0.
          state: a pytree of jax.Arrays.
          meta: plain data as JSON holds it, returned by `read_meta`.

        Raises:
          ValueError: if `meta` holds NaN or infinity.
          SaveError: if the previous save failed.
        """
        self.wait()
        folder = self.folder(step)
        sealed = {
            "step": step,
            "meta": json.loads(json.dumps(meta, allow_nan=False)),
            "arrays": _layout(state),
        }
        if jax.process_index() == 0:
            make_folder(self._directory)
            _remove(folder)
            self.remove_unfinished()
        response = ocp.save_async(self._place(step), state, overwrite=True)
        self._pending = self._thread.submit(self._finish, response, sealed)

    def folder(self, step: int) -> epath.Path:
        """Returns the folder of a step's checkpoint, which need not exist."""
        return self._directory / str(step)

    def folders(self) -> list[int]:
        """Returns the steps of all folders in place, oldest first, whether or not their save is finished."""
        if not self._directory.exists():
            return []
        steps = (_step(path.name) for path in self._directory.iterdir())
        return sorted(step for step in steps if step is not None)

    def unfinished(self) -> list[tuple[int, epath.Path]]:
        """Returns step and folder of saves that are not in place: in progress, or killed."""
        found = ((_step(path.name.partition(".")[0]), path) for path in self._unfinished())
        return sorted((step, path) for step, path in found if step is not None)

    def steps(self) -> list[int]:
        """Returns the steps whose save is finished, oldest first."""
        return [step for step in self.folders() if manifest.is_sealed(self.folder(step))]

    def damage(self, step: int, advance: Advance | None = None) -> list[str]:
        """Returns a line for each damaged file of a checkpoint; empty if it is good.

        Args:
          step: the checkpoint.
          advance: called with the number of bytes of each chunk that was read; None for a progress bar.
        """
        folder = self.folder(step)
        found = _damage(folder, step) if advance is None else manifest.damage(folder, step, advance)
        # In a bucket, an index that cannot be read may be that of a store out of reach.
        return found if found or buckets.in_bucket(folder) else _unrestorable(folder, step)

    def latest_good(self) -> tuple[int | None, list[str]]:
        """Finds the newest checkpoint of which every byte is as it was saved.

        Damaged newer ones are kept until a still newer one is saved.

        Returns:
          The step, None if there is none, and a line for each damaged file of newer ones. Process 0 alone
          verifies and has these lines.
        """
        good, problems = -1, []
        for step in reversed(self.folders()) if jax.process_index() == 0 else ():
            found = self.damage(step)
            problems += found
            if not found:
                good = step
                break
            self._damaged.add(step)
        good = _from_first_process(good)
        return (None if good < 0 else good), problems

    def read_meta(self, step: int) -> Json:
        """Returns what was saved beside the arrays.

        Raises:
          InputError: if there is no such checkpoint, its save is unfinished, or its manifest is damaged.
        """
        return manifest.read(self.folder(step), step)["meta"]

    def check_layout(self, step: int, abstract_state: Any) -> None:
        """Raises InputError unless names, shapes and types of the saved arrays are those of a state."""
        folder = self.folder(step)
        _check_layout(folder, manifest.read(folder, step)["arrays"], _layout(abstract_state))

    def restore(self, step: int, abstract_state: Any) -> Any:
        """Returns the saved arrays, bit for bit, with the given shardings.

        Args:
          step: one of `steps()`.
          abstract_state: pytree of jax.ShapeDtypeStruct with shardings, which may differ from those saved.

        Raises:
          InputError: if any file is damaged, or names, shapes or types of the arrays differ.
        """
        with self._readable(step) as folder:
            problems = _damage(folder, step) if jax.process_index() == 0 else []
            if _from_first_process(len(problems)):
                raise InputError(f"checkpoint {step} cannot be restored: {some(problems) or 'see process 0'}")
            _check_layout(folder, manifest.read(folder, step)["arrays"], _layout(abstract_state))
            try:
                return ocp.load(folder, abstract_state)
            # Files made to harm can make orbax and TensorStore raise anything.
            except Exception as error:
                if exhausted(error):
                    raise
                raise InputError(f"{folder} cannot be restored: {_system_reason(error)[1]}") from error

    def remove_unfinished(self) -> None:
        """Removes what killed or failed saves left behind. No other process may be saving."""
        if jax.process_index():
            return
        self.wait()
        if self._uploaded:
            shutil.rmtree(self._local(), ignore_errors=True)
        if not self._directory.exists():
            return
        for path in self._unfinished():
            _remove(path)
        for step in set(self.folders()).difference(self.steps()):
            _remove(self.folder(step))

    def poll(self) -> None:
        """Raises SaveError if the current save has failed. Does not wait."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Waits for the current save. Raises SaveError if it failed."""
        if self._pending is None:
            return
        try:
            self._pending.result()
        finally:
            if self._pending.done():  # false if a signal interrupted the wait
                self._pending = None

    def close(self) -> None:
        """Waits for the current save and ends the thread. Raises SaveError if it failed."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _finish(self, response: ocp.AsyncResponse[None], sealed: Json) -> None:
        step = sealed["step"]
        with _save_errors(self.folder(step), "could not be saved"):
            response.result()
            if jax.process_index() == 0:
                self._before_sealing()
                check_restorable(self._place(step), sealed["arrays"])
                manifest.seal(self._place(step), sealed)
                if self._uploaded:
                    self._upload(step)
        if jax.process_index() == 0:
            self._damaged.discard(step)
            with _save_errors(self.folder(step), "was saved, but older ones could not be removed"):
                self._remove_old(step)

    def _unfinished(self) -> list[epath.Path]:
        there = self._directory.iterdir() if self._directory.exists() else ()
        return [path for path in there if _UNFINISHED in path.name]

    def _local(self) -> Path:
        return buckets.stand_in("checkpoints", str(self._directory))

    def _place(self, step: int) -> epath.Path:
        """Returns where orbax writes a checkpoint."""
        return epath.Path(self._local() / str(step)) if self._uploaded else self.folder(step)

    def _upload(self, step: int) -> None:
        """Uploads a sealed checkpoint, its manifest last."""
        place, folder = Path(self._place(step)), str(self.folder(step))
        names = set(buckets.files(place)) - {MANIFEST}
        for these in (names, {MANIFEST}):
            buckets.upload(place, folder, these, lambda n: None)
        shutil.rmtree(place)

    @contextlib.contextmanager
    def _readable(self, step: int) -> Iterator[epath.Path]:
        """Yields a checkpoint's folder where orbax can read it."""
        folder = self.folder(step)
        if not self._uploaded:
            yield folder
            return
        there = {name: found.size for name, found in buckets.objects(folder).items()}
        buckets.check_room(sum(there.values()), buckets.cache_folder())
        with tempfile.TemporaryDirectory(prefix="reading-", dir=buckets.cache_folder()) as here:
            place = Path(here) / str(step)
            with progress(f"downloading checkpoint {step}", sum(there.values()) / 1e6, "MB") as megabytes:
                for _ in buckets.download(str(folder), place, there, lambda n: megabytes(n / 1e6)):
                    pass
            yield epath.Path(place)

    def _remove_old(self, saved: int) -> None:
        """Removes checkpoints up to the saved one that are not to be kept."""
        complete = [step for step in self.steps() if step <= saved and step not in self._damaged]
        kept = set(complete[0 if self._keep is None else -self._keep :])
        kept |= {step for step in complete if self._keep_every and step % self._keep_every == 0}
        for step in self.folders():
            if step <= saved and step not in kept:
                _remove(self.folder(step))
                self._damaged.discard(step)


def _step(name: str) -> int | None:
    """Returns the step that a folder's name gives, None unless it is spelled as here."""
    number = int(name) if name.isascii() and name.isdigit() and len(name) <= 10 else -1
    return number if str(number) == name and 0 <= number <= _LARGEST_STEP else None


def _unrestorable(folder: epath.Path, step: int) -> list[str]:
    try:
        check_restorable(folder, manifest.read(folder, step)["arrays"])
    except InputError as error:
        return [str(error)]
    return []


def _damage(folder: epath.Path, step: int) -> list[str]:
    total = sum(size or 0 for size in manifest.sizes(folder).values()) / 1e6
    with progress(f"verifying checkpoint {step}", total, "MB") as megabytes:
        return manifest.damage(folder, step, lambda n: megabytes(n / 1e6))


@contextlib.contextmanager
def _save_errors(folder: epath.Path, what: str) -> Iterator[None]:
    """Turns any error of orbax or the disk into one SaveError, or a MemoryError if memory ran out."""
    with without_logged_tracebacks():
        try:
            yield
        except Exception as error:
            end_failed_save()
            number, words = _system_reason(error)
            if exhausted(error):
                raise MemoryError(f"{folder} {what}: {words}") from error
            raise SaveError(number, f"{what}: {words}", str(folder)) from error


def _system_reason(error: Exception) -> tuple[int, str]:
    """Returns the system's number and words for an error. TensorStore has the number in its text."""
    found = re.search(r"os_error_code='(\d+)'", str(error))
    number = int(found[1]) if found else error.errno if isinstance(error, OSError) else None
    if number:
        return number, os.strerror(number)
    without_spec = str(error).partition("[tensorstore_spec")[0]  # pages of no use
    return errno.EIO, " ".join(without_spec.split()) or type(error).__name__


def _remove(path: epath.Path) -> None:
    """Removes a folder, or a file in its place. Of a link, only the link is removed."""
    if manifest.is_link(path) or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        # The manifest first: a half removed checkpoint then counts as unfinished.
        (path / MANIFEST).unlink(missing_ok=True)
        path.rmtree(missing_ok=True)


def _layout(tree: Any) -> dict[str, str]:
    """Returns the type and shape of each array, such as `float32[2, 3]`, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in leaves
    }


def _check_layout(folder: epath.Path, saved: dict[str, str], wanted: dict[str, str]) -> None:
    names = sorted(saved.keys() | wanted.keys())
    problems = [
        f"{n} is {saved.get(n, 'missing')} and must be {wanted.get(n, 'absent')}"
        for n in names
        if saved.get(n) != wanted.get(n)
    ]
    if problems:
        raise InputError(f"{folder} holds another state than the config's: {some(problems)}")


def _from_first_process(value: int) -> int:
    """Returns process 0's value on every process, so that all take the same branch."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))
