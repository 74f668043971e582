"""Checkpoints that can be trusted: written by orbax in the background, each sealed with a manifest.

A checkpoint is a folder `<directory>/<step>`: orbax's files, and `manifest.json`, which is written last and
holds the size and hash of every file, what was saved beside the arrays, and a hash of itself. A folder
without a manifest is a save that did not finish, and is never loaded.
"""

import concurrent.futures
import hashlib
import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from mora_jax.errors import InputError

MANIFEST = "manifest.json"
# A manifest is read whole; a larger file is not one of ours.
_MANIFEST_LIMIT = 1 << 26
_CHUNK = 1 << 22
_HASHERS = 4
# In the name of the folder that orbax writes to before it moves it into place.
_UNFINISHED = "orbax-checkpoint-tmp"

Json = dict[str, Any]


class Checkpoints:
    """The checkpoints of one run; leaving the context waits for the save under way.

    Every process calls every method. Nothing is written or removed before the first `save`, so that a run's
    checkpoints can be read while it trains.

    Orbax's own manager of checkpoints is not used: it would count what is not yet sealed as complete, and
    remove older ones for it.
    """

    def __init__(self, directory: str, keep: int | None = None) -> None:
        """Args:
        directory: the folder of the checkpoints, any etils.epath path; made by the first save.
        keep: how many of the newest are kept; None for all.
        """
        if keep is not None and keep < 1:
            raise InputError(f"at least 1 checkpoint must be kept, not {keep}")
        # Orbax asks for absolute paths.
        self._directory = epath.Path(directory if "://" in directory else Path(directory).absolute())
        self._keep = keep
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None

    def save(self, step: int, state: Any, meta: Json) -> None:
        """Saves in the background, after the save before is done; never skips.

        When it returns, the arrays have been copied: they may be donated. A checkpoint that the step already
        has is replaced.

        Args:
          step: the number of the checkpoint, at least 0.
          state: a pytree of jax.Arrays.
          meta: plain data as JSON holds it, returned by `read_meta`.

        Raises:
          ValueError: if `meta` holds NaN or infinity.
          Exception: what made the save before fail.
        """
        self.wait()
        folder = self._folder(step)
        sealed = {
            "step": step,
            "meta": json.loads(json.dumps(meta, allow_nan=False)),
            "arrays": _layout(state),
        }
        if jax.process_index() == 0:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._remove_unfinished()
            (folder / MANIFEST).unlink(missing_ok=True)
        response = ocp.save_async(folder, state, overwrite=True)
        self._pending = self._thread.submit(self._finish, response, sealed)

    def steps(self) -> list[int]:
        """The steps whose save was finished, oldest first."""
        return [step for step in self._folders() if (self._folder(step) / MANIFEST).exists()]

    def damage(self, step: int) -> list[str]:
        """What of a checkpoint is not as it was saved, a line for each file; empty where it is good."""
        folder = self._folder(step)
        try:
            want = _read_manifest(folder, step)["files"]
        except InputError as error:
            return [str(error)]
        have = _fingerprints(folder)
        names = sorted(want.keys() | have.keys())
        return [
            f"{folder / n} {_differs(want.get(n), have.get(n))}" for n in names if want.get(n) != have.get(n)
        ]

    def latest_good(self) -> tuple[int | None, list[str]]:
        """The newest step that is wholly as it was saved, None if there is none.

        Returns:
          The step, and a line for each thing that is wrong with newer ones (on process 0, which alone looks).
        """
        good, problems = -1, []
        for step in reversed(self._folders()) if jax.process_index() == 0 else ():
            found = self.damage(step)
            problems += found
            if not found:
                good = step
                break
        good = _from_first_process(good)
        return (None if good < 0 else good), problems

    def read_meta(self, step: int) -> Json:
        """What was saved beside the arrays.

        Raises:
          InputError: if there is no such checkpoint, its save did not finish, or its manifest is damaged.
        """
        return _read_manifest(self._folder(step), step)["meta"]

    def restore(self, step: int, abstract_state: Any) -> Any:
        """The saved arrays, bit for bit, with the shardings asked for.

        Args:
          step: one of `steps()`.
          abstract_state: pytree of jax.ShapeDtypeStruct with shardings, which may be others than when saved.

        Raises:
          InputError: if any file is not as it was saved, or names, shapes or types of the arrays are others.
        """
        problems = self.damage(step) if jax.process_index() == 0 else []
        if _from_first_process(len(problems)):
            raise InputError(
                f"checkpoint {step} cannot be restored: {_some(problems) or 'process 0 says why'}"
            )
        folder = self._folder(step)
        _check_layout(folder, _read_manifest(folder, step)["arrays"], _layout(abstract_state))
        return ocp.load(folder, abstract_state)

    def wait(self) -> None:
        """Waits for the save under way. Raises what made it fail."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits as `wait` does, and ends the thread."""
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

    def _folder(self, step: int) -> epath.Path:
        return self._directory / str(step)

    def _folders(self) -> list[int]:
        """The steps of all folders in place, oldest first, whether or not they are sealed."""
        if not self._directory.exists():
            return []
        names = (path.name for path in self._directory.iterdir())
        return sorted(int(n) for n in names if n.isascii() and n.isdigit() and str(int(n)) == n)

    def _finish(self, response: ocp.AsyncResponse[None], sealed: Json) -> None:
        response.result()
        if jax.process_index() == 0:
            folder = self._folder(sealed["step"])
            _write_manifest(folder, sealed | {"files": _fingerprints(folder)})
            self._remove_old(sealed["step"])

    def _remove_old(self, saved: int) -> None:
        """Removes what is older than the newest `keep` up to the saved one; never what is newer."""
        complete = [step for step in self.steps() if step <= saved]
        oldest = complete[0 if self._keep is None else -self._keep :][0]
        for step in [s for s in self._folders() if s < oldest]:
            # Without its manifest a half removed checkpoint is an unfinished one.
            (self._folder(step) / MANIFEST).unlink(missing_ok=True)
            self._folder(step).rmtree()

    def _remove_unfinished(self) -> None:
        """Removes what saves that were killed left behind. No other save is under way."""
        for path in list(self._directory.iterdir()):
            if _UNFINISHED in path.name:
                path.rmtree()


def _layout(tree: Any) -> dict[str, str]:
    """Path of each array -> its type and shape, such as `float32[2, 3]`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in leaves
    }


def _check_layout(folder: epath.Path, saved: dict[str, str], wanted: dict[str, str]) -> None:
    names = sorted(saved.keys() | wanted.keys())
    problems = [
        f"{n} is {saved.get(n, 'not there')} and must be {wanted.get(n, 'absent')}"
        for n in names
        if saved.get(n) != wanted.get(n)
    ]
    if problems:
        raise InputError(f"{folder} holds another state than the config's: {_some(problems)}")


def _fingerprints(folder: epath.Path) -> dict[str, Json]:
    """Relative path of every file but the manifest -> its size in bytes and its hash."""
    files = [root / name for root, _, names in folder.walk() for name in names]
    files = sorted(path for path in files if path != folder / MANIFEST)
    with concurrent.futures.ThreadPoolExecutor(_HASHERS) as pool:
        found = pool.map(_fingerprint, files)
        return {path.relative_to(folder).as_posix(): f for path, f in zip(files, found, strict=True)}


def _fingerprint(path: epath.Path) -> Json:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _differs(want: Any, have: Json | None) -> str:
    if have is None:
        return "is missing"
    if want is None:
        return "does not belong to the checkpoint; remove it"
    if want["bytes"] != have["bytes"]:
        return f"is damaged: it has {have['bytes']} bytes and was saved with {want['bytes']}"
    return "is damaged: its content is not what was saved"


def _render(manifest: Json) -> str:
    """The one text that a manifest can have, its own hash included: any change of it is seen."""
    body = json.dumps(manifest, sort_keys=True, allow_nan=False)
    seal = hashlib.sha256(body.encode()).hexdigest()
    return json.dumps(manifest | {"sha256": seal}, sort_keys=True, indent=1) + "\n"


def _write_manifest(folder: epath.Path, manifest: Json) -> None:
    unsealed = folder / f"{MANIFEST}.part"
    unsealed.write_text(_render(manifest))
    unsealed.replace(folder / MANIFEST)


def _read_manifest(folder: epath.Path, step: int) -> Json:
    """Raises InputError unless it is, to the letter, what was written for this step."""
    path = folder / MANIFEST
    if not folder.exists():
        raise InputError(f"{folder} does not exist")
    if not path.exists():
        raise InputError(f"{path} is missing: the save did not finish, or the file was removed")
    if path.stat().length > _MANIFEST_LIMIT:
        raise InputError(f"{path} is damaged: it has more than {_MANIFEST_LIMIT} bytes")
    manifest = _parse_manifest(path.read_bytes())
    if manifest is None:
        raise InputError(f"{path} is damaged: its content is not what was saved")
    if manifest["step"] != step:
        raise InputError(f"{folder} is damaged: it holds the checkpoint of step {manifest['step']}")
    return manifest


def _parse_manifest(content: bytes) -> Json | None:
    """None unless it is well formed and its own hash is right."""
    try:
        manifest = json.loads(content)
        del manifest["sha256"]
        intact = _render(manifest).encode() == content
        files = manifest["files"].values()
        well_formed = all(type(f["bytes"]) is int and type(f["sha256"]) is str for f in files)
        well_formed &= manifest.keys() == {"step", "meta", "arrays", "files"}
        well_formed &= all(type(a) is str for a in manifest["arrays"].values())
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return manifest if intact and well_formed else None


def _from_first_process(value: int) -> int:
    """Process 0's value, on every process: all must go the same way."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def _some(problems: list[str], limit: int = 3) -> str:
    more = f"; and {len(problems) - limit} more" if len(problems) > limit else ""
    return "; ".join(problems[:limit]) + more
