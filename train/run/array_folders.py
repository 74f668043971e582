"""Folders of arrays, each written by orbax, sealed by a manifest, and verified before it is read.

A folder is `<directory>/<name>`, with orbax's files and `manifest.json`. The manifest is written last. A
folder without one is an unfinished save and is never loaded.
"""

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from mora_jax.errors import InputError, some
from train.console.progress import progress
from train.run import manifest
from train.run.arrays import check_layout, check_restorable, layout
from train.run.manifest import MANIFEST, Advance, Json
from train.runtime.memory import exhausted
from train.runtime.workarounds import (
    drop_logged_tracebacks,
    end_failed_save,
    ignore_closed_loops,
    take_folders_literally,
)
from train.storage import buckets
from train.storage.files import make_folder

# Part of the name of the folder that orbax writes to before it moves it into place.
_UNFINISHED = "orbax-checkpoint-tmp"
# Where orbax cannot write: a folder is written on this machine's disk and uploaded, and downloaded to be
# read.
_UPLOADED = "s3://"


class SaveError(OSError):
    """Arrays could not be saved, for instance on a full disk. Earlier ones are untouched."""


class ArrayFolders:
    """The folders of arrays in a directory. Each has a name, and a number that its manifest repeats.

    Attributes:
      directory: where they lie.
    """

    def __init__(self, directory: str) -> None:
        """Args:
          directory: on a disk or in a bucket. The first `write` makes it.

        Raises:
          InputError: if it is not a folder, or several processes are to write to s3://.
        """
        buckets.configure()
        take_folders_literally()
        ignore_closed_loops()
        drop_logged_tracebacks()
        bucket = buckets.in_bucket(directory)
        # Orbax requires absolute paths.
        self.directory = epath.Path(directory if bucket else Path(directory).absolute())
        if not bucket and os.path.lexists(directory) and not Path(directory).is_dir():
            raise InputError(f"{directory} is not a folder; remove it")
        self._uploaded = directory.startswith(_UPLOADED)
        if self._uploaded and jax.process_count() > 1:
            raise InputError(
                f"{directory}: several processes cannot write checkpoints to {_UPLOADED}; use gs:// or a "
                "disk that they share"
            )

    def names(self) -> list[str]:
        """Returns the names of all that lies in the directory."""
        return [path.name for path in self.directory.iterdir()] if self.directory.exists() else []

    def unfinished(self) -> list[epath.Path]:
        """Returns the folders of saves that are not in place: in progress, or killed."""
        return [self.directory / name for name in self.names() if _UNFINISHED in name]

    def remove_unfinished(self) -> None:
        """Removes what killed or failed saves left behind, but for folders in place. Nothing may be saved."""
        if self._uploaded:
            shutil.rmtree(self._local(), ignore_errors=True)
        for path in self.unfinished():
            _remove(path)

    def remove(self, name: str) -> None:
        """Removes a folder, or a file in its place. Of a link, only the link is removed."""
        _remove(self.directory / name)

    def write(self, name: str, arrays: Any) -> ocp.AsyncResponse[None]:
        """Begins to write arrays in the background; `seal` must follow. Every process must call it.

        When it returns, the arrays have been copied and may be donated.
        """
        if jax.process_index() == 0:
            make_folder(self.directory)
            self.remove(name)
        return ocp.save_async(self._place(name), arrays, overwrite=True)

    def seal(
        self,
        name: str,
        response: ocp.AsyncResponse[None],
        content: Json,
        before: Callable[[], None] = lambda: None,
    ) -> str:
        """Waits until a folder is written, and writes its manifest.

        Args:
          name: the folder's name.
          response: what `write` returned.
          content: the manifest's, but for the files.
          before: called on process 0, when the folder is complete but for its manifest.

        Returns:
          The manifest's hash; empty on all processes but the first.
        """
        response.result()
        if jax.process_index():
            return ""
        before()
        check_restorable(self._place(name), content["arrays"])
        digest = manifest.seal(self._place(name), content)
        if self._uploaded:
            self._upload(name)
        return digest

    def damage(self, name: str, number: int, advance: Advance | None = None) -> list[str]:
        """Returns a line for each damaged file of a folder; empty if it is good.

        Args:
          name: the folder's name.
          number: the number that it must have.
          advance: called with the number of bytes of each chunk that was read; None for a progress bar.
        """
        folder = self.directory / name
        found = manifest.damage(folder, number, advance) if advance else _damage(folder, number)
        # In a bucket, an index that cannot be read may be that of a store out of reach.
        return found if found or buckets.in_bucket(folder) else _unrestorable(folder, number)

    def restore(self, name: str, number: int, abstract: Any, partial: bool = False) -> Any:
        """Returns the arrays of a folder, bit for bit, with the given shardings. Every process must call it.

        Args:
          name: the folder's name.
          number: the number that it must have.
          abstract: pytree of jax.ShapeDtypeStruct with shardings, which may differ from those saved.
          partial: whether the folder may hold more arrays, which are then verified and not read into memory.

        Raises:
          InputError: if any file is damaged, or names, shapes or types of the arrays differ.
        """
        with self._readable(name) as folder:
            problems = _damage(folder, number) if jax.process_index() == 0 else []
            if from_first_process(len(problems)):
                what = some(problems) or "see process 0"
                raise InputError(f"{self.directory / name} cannot be restored: {what}")
            saved, wanted = manifest.read(folder, number)["arrays"], layout(abstract)
            if partial:
                saved = {name: text for name, text in saved.items() if name in wanted}
            check_layout(folder, saved, wanted)
            context = ocp.Context()
            context.pytree.loading.partial_load = partial
            try:
                with context:
                    return ocp.load(folder, abstract)
            # Files made to harm can make orbax and TensorStore raise anything.
            except Exception as error:
                if exhausted(error):
                    raise
                raise InputError(f"{folder} cannot be restored: {_system_reason(error)[1]}") from error

    def _local(self) -> Path:
        return buckets.stand_in("checkpoints", str(self.directory))

    def _place(self, name: str) -> epath.Path:
        """Returns where orbax writes a folder."""
        return epath.Path(self._local() / name) if self._uploaded else self.directory / name

    def _upload(self, name: str) -> None:
        """Uploads a sealed folder, its manifest last."""
        place, folder = Path(self._place(name)), str(self.directory / name)
        names = set(buckets.files(place)) - {MANIFEST}
        for these in (names, {MANIFEST}):
            buckets.upload(place, folder, these, lambda n: None)
        shutil.rmtree(place)

    @contextlib.contextmanager
    def _readable(self, name: str) -> Iterator[epath.Path]:
        """Yields a folder where orbax can read it."""
        folder = self.directory / name
        if not self._uploaded:
            yield folder
            return
        there = {name: found.size for name, found in buckets.objects(folder).items()}
        buckets.check_room(sum(there.values()), buckets.cache_folder())
        with tempfile.TemporaryDirectory(prefix="reading-", dir=buckets.cache_folder()) as here:
            place = Path(here) / name
            with progress(f"downloading checkpoint {name}", sum(there.values()) / 1e6, "MB") as megabytes:
                for _ in buckets.download(str(folder), place, there, lambda n: megabytes(n / 1e6)):
                    pass
            yield epath.Path(place)


@contextlib.contextmanager
def save_errors(folder: epath.Path, what: str) -> Iterator[None]:
    """Turns any error of orbax or the disk into one SaveError, or a MemoryError if memory ran out."""
    try:
        yield
    except Exception as error:
        end_failed_save()
        number, words = _system_reason(error)
        if exhausted(error):
            raise MemoryError(f"{folder} {what}: {words}") from error
        raise SaveError(number, f"{what}: {words}", str(folder)) from error


def from_first_process(value: int) -> int:
    """Returns process 0's value on every process, so that all take the same branch."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def _remove(path: epath.Path) -> None:
    if manifest.is_link(path) or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        # The manifest first: a half removed folder then counts as unfinished.
        (path / MANIFEST).unlink(missing_ok=True)
        path.rmtree(missing_ok=True)


def _damage(folder: epath.Path, number: int) -> list[str]:
    total = sum(size or 0 for size in manifest.sizes(folder).values()) / 1e6
    with progress(f"verifying checkpoint {folder.name}", total, "MB") as megabytes:
        return manifest.damage(folder, number, lambda n: megabytes(n / 1e6))


def _unrestorable(folder: epath.Path, number: int) -> list[str]:
    try:
        check_restorable(folder, manifest.read(folder, number)["arrays"])
    except InputError as error:
        return [str(error)]
    return []


def _system_reason(error: Exception) -> tuple[int, str]:
    """Returns the system's number and words for an error. TensorStore has the number in its text."""
    found = re.search(r"os_error_code='(\d+)'", str(error))
    number = int(found[1]) if found else error.errno if isinstance(error, OSError) else None
    if number:
        return number, os.strerror(number)
    without_spec = str(error).partition("[tensorstore_spec")[0]  # pages of no use
    return errno.EIO, " ".join(without_spec.split()) or type(error).__name__
