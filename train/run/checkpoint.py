"""Checkpoints, written in the background, and the bases that they share.

A checkpoint is a sealed folder of arrays, `<directory>/<step>`. Its manifest also holds what was saved beside
the arrays. Arrays that do not change from one checkpoint to the next, their base, lie in a sealed folder of
their own, `<directory>/base-<restarts>`. It is sealed before the first checkpoint that refers to it, and
removed after the last.
"""

import concurrent.futures
import contextlib
import json
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from mora_jax.errors import InputError
from train.run import base as bases
from train.run import manifest
from train.run.array_folders import ArrayFolders, SaveError, from_first_process, save_errors
from train.run.arrays import check_layout, layout
from train.run.base import Base, Kept
from train.run.manifest import Advance, Json

__all__ = ["Checkpoints", "SaveError"]

_LARGEST_STEP = 2**31 - 1


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
        self._folders = ArrayFolders(directory)
        self._before_sealing = before_sealing
        self._keep = keep
        self._keep_every = keep_every
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None
        self._damaged: set[int] = set()  # found by `latest_good`
        self._base: Base | None = None  # what the next save refers to

    def refer_to(self, base: Base) -> None:
        """Makes saves refer to a base, as long as their number of restarts is its own."""
        self._base = base

    def save(self, step: int, state: Any, meta: Json, base: Any = None, restarts: int = 0) -> None:
        """Saves in the background, after the previous save is done. Never skips a save.

        When it returns, the arrays have been copied and may be donated. An existing checkpoint of the step is
        replaced.

        Args:
          step: the number of the checkpoint, at least 0.
          state: a pytree of jax.Arrays.
          meta: plain data as JSON holds it, returned by `read_meta`.
          base: a pytree of jax.Arrays that `state` lacks and that restarts alone change; None if there are
            none. They are saved once, unless `refer_to` or `restore_base` has said what to refer to.
          restarts: restarts done.

        Raises:
          ValueError: if `meta` holds NaN or infinity.
          SaveError: if the previous save failed.
        """
        self.wait()
        content: Json = {
            "step": step,
            "meta": json.loads(json.dumps(meta, allow_nan=False)),
            "arrays": layout(state),
        }
        if jax.process_index() == 0:
            self._folders.remove(str(step))
            self.remove_unfinished()
        kept = None
        if base is not None and (self._base is None or self._base.restarts != restarts):
            self._base = None  # until it is sealed
            response = self._folders.write(bases.folder_name(restarts), base)
            kept = response, {"step": restarts, "meta": {}, "arrays": layout(base)}
        response = self._folders.write(str(step), state)
        self._pending = self._thread.submit(self._finish, response, content, kept, base is not None)

    def folder(self, step: int) -> epath.Path:
        """Returns the folder of a step's checkpoint, which need not exist."""
        return self._folders.directory / str(step)

    def base_folder(self, base: Kept) -> epath.Path:
        """Returns the folder of a base that is kept, which need not exist."""
        return self._folders.directory / str(base)

    def folders(self) -> list[int]:
        """Returns the steps of all folders in place, oldest first, whether or not their save is finished."""
        return sorted(step for step in map(_step, self._folders.names()) if step is not None)

    def unfinished(self) -> list[tuple[int, epath.Path]]:
        """Returns step and folder of saves that are not in place: in progress, or killed."""
        found = ((_step(path.name.partition(".")[0]), path) for path in self._folders.unfinished())
        return sorted((step, path) for step, path in found if step is not None)

    def steps(self) -> list[int]:
        """Returns the steps whose save is finished, oldest first."""
        return [step for step in self.folders() if manifest.is_sealed(self.folder(step))]

    def damage(self, step: int, advance: Advance | None = None) -> list[str]:
        """Returns a line for each damaged file of a checkpoint, or of the base kept for it; empty if good.

        Args:
          step: the checkpoint.
          advance: called with the number of bytes of each chunk that was read; None for a progress bar.
        """
        found = self._folders.damage(str(step), step, advance)
        try:
            base = None if found else self.base_of(step)
            if not isinstance(base, Kept):
                return found
            return self._folders.damage(str(base), base.restarts, advance) or self._mistaken(step, base)
        except InputError as error:  # another program removed it meanwhile
            return [str(error)]

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
            problems += [line for line in found if line not in problems]  # of a base that they share
            if not found:
                good = step
                break
            self._damaged.add(step)
        good = from_first_process(good)
        return (None if good < 0 else good), problems

    def read_meta(self, step: int) -> Json:
        """Returns what was saved beside the arrays.

        Raises:
          InputError: if there is no such checkpoint, its save is unfinished, or its manifest is damaged.
        """
        return manifest.read(self.folder(step), step)["meta"]

    def base_of(self, step: int) -> Base | None:
        """Returns the base that a checkpoint refers to, None if it holds the whole state.

        Raises:
          InputError: as `read_meta`.
        """
        plain = manifest.read(self.folder(step), step).get("base")
        return bases.from_json(plain) if plain else None

    def readable_base(self, step: int) -> Base | None:
        """Returns `base_of`, and None for a checkpoint that cannot be read: it refers to nothing."""
        with contextlib.suppress(InputError):
            return self.base_of(step)

    def check_layout(self, step: int, abstract_state: Any, abstract_base: Any = None) -> None:
        """Raises InputError unless names, shapes and types of the saved arrays are those of a state.

        Args:
          step: the checkpoint.
          abstract_state: the arrays that it must hold.
          abstract_base: those that the base kept for it must hold; not used without one.
        """
        folder, base = self.folder(step), self.base_of(step)
        check_layout(folder, manifest.read(folder, step)["arrays"], layout(abstract_state))
        if isinstance(base, Kept):
            folder = self.base_folder(base)
            check_layout(folder, manifest.read(folder, base.restarts)["arrays"], layout(abstract_base))

    def restore(self, step: int, abstract_state: Any, partial: bool = False) -> Any:
        """Returns the arrays in a checkpoint, bit for bit, with the given shardings.

        Args:
          step: one of `steps()`.
          abstract_state: pytree of jax.ShapeDtypeStruct with shardings, which may differ from those saved.
          partial: whether the checkpoint may hold more arrays. All of its files are verified in any case.

        Raises:
          InputError: if any file is damaged, or names, shapes or types of the arrays differ.
        """
        return self._folders.restore(str(step), step, abstract_state, partial)

    def restore_base(self, step: int, abstract_base: Any) -> Any:
        """Returns the arrays of the base that is kept for a checkpoint, as `restore`. Saves then refer to it.

        Raises:
          InputError: as `restore`, and if the folder holds another base.
        """
        base = self.base_of(step)
        assert isinstance(base, Kept)
        arrays = self._folders.restore(str(base), base.restarts, abstract_base)
        if problems := self._mistaken(step, base):
            raise InputError(f"checkpoint {step} cannot be restored: {problems[0]}")
        self.refer_to(base)
        return arrays

    def remove_unfinished(self) -> None:
        """Removes what killed or failed saves left behind. No other process may be saving."""
        if jax.process_index():
            return
        self.wait()
        self._folders.remove_unfinished()
        for name in (*map(str, self.folders()), *self._bases()):
            if not manifest.is_sealed(self._folders.directory / name):
                self._folders.remove(name)

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

    def _finish(
        self,
        response: ocp.AsyncResponse[None],
        content: Json,
        kept: tuple[ocp.AsyncResponse[None], Json] | None,
        refers: bool,
    ) -> None:
        """Seals a checkpoint, and before it the base that is saved with it."""
        step = content["step"]
        with save_errors(self.folder(step), "could not be saved"):
            if kept:
                restarts = kept[1]["step"]
                self._base = Kept(restarts, self._folders.seal(bases.folder_name(restarts), *kept))
            if refers:
                assert self._base
                content |= {"base": bases.to_json(self._base)}
            self._folders.seal(str(step), response, content, self._before_sealing)
        if jax.process_index() == 0:
            self._damaged.discard(step)
            with save_errors(self.folder(step), "was saved, but older ones could not be removed"):
                self._remove_old(step)

    def _remove_old(self, saved: int) -> None:
        """Removes checkpoints up to the saved one that are not to be kept, and bases that none refers to.

        If several are kept and share a base, so is the newest one of another base: a base may be damaged too.
        """
        complete = [step for step in self.steps() if step <= saved and step not in self._damaged]
        kept = set(complete[0 if self._keep is None else -self._keep :])
        kept |= {step for step in complete if self._keep_every and step % self._keep_every == 0}
        if self._keep != 1 and len(self._bases()) > 1:
            named = {step: self.readable_base(step) for step in complete}
            others = [step for step in complete if named[step] != named[complete[-1]]]
            kept |= set(others[-1:])
        for step in self.folders():
            if step <= saved and step not in kept:
                self._folders.remove(str(step))
                self._damaged.discard(step)
        if len(there := self._bases()) > 1:
            used = {str(self.readable_base(step)) for step in self.steps()}
            for name in set(there) - used:
                self._folders.remove(name)

    def _bases(self) -> list[str]:
        """Returns the names of all bases' folders in place, sealed or not."""
        return [name for name in self._folders.names() if bases.is_folder_name(name)]

    def _mistaken(self, step: int, base: Kept) -> list[str]:
        """Returns a line if the folder of a checkpoint's base holds another one."""
        folder = self.base_folder(base)
        if manifest.identity(manifest.read(folder, base.restarts)) == base.sha256:
            return []
        return [f"{folder} is not the base that {self.folder(step)} was saved with"]


def _step(name: str) -> int | None:
    """Returns the step that a folder's name gives, None unless it is spelled as here."""
    number = int(name) if name.isascii() and name.isdigit() and len(name) <= 10 else -1
    return number if str(number) == name and 0 <= number <= _LARGEST_STEP else None
