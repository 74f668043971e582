"""A folder sealed by a manifest: the size and hash of every file in it, and a hash of the manifest itself.

The manifest is written last and atomically. A folder without one is unfinished.
"""

import concurrent.futures
import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from etils import epath

from mora_jax.errors import InputError
from train.run import base
from train.storage import buckets
from train.storage.files import sha256, sync, write_whole

MANIFEST = "manifest.json"
# Bytes of a manifest, which is read into memory; a larger file is not one of ours.
_LIMIT = 1 << 26
_HASHERS = 4

Json = dict[str, Any]
Advance = Callable[[float], None]


def seal(folder: epath.Path, content: Json) -> str:
    """Writes the manifest: `content` (step, meta, arrays, base) and the size and hash of every file.

    On a local disk, all files are synced before the manifest, and the manifest before this returns.

    Returns:
      The manifest's hash, as `identity` finds it.
    """
    files = [folder / name for name in sizes(folder)]
    with concurrent.futures.ThreadPoolExecutor(_HASHERS) as pool:
        found = list(pool.map(_fingerprint, files))
    for inner in (*{path.parent for path in files}, folder.parent):
        sync(inner)
    names = {path.relative_to(folder).as_posix(): print_ for path, print_ in zip(files, found, strict=True)}
    manifest = content | {"files": names}
    write_whole(folder / MANIFEST, render(manifest))
    return identity(manifest)


def read(folder: epath.Path, step: int) -> Json:
    """Returns the manifest. Raises InputError unless it is exactly what was written for this number.

    Args:
      folder: the folder of a checkpoint or of a base.
      step: its step, or the restarts of a base.
    """
    path = folder / MANIFEST
    if is_link(folder):
        raise InputError(f"{folder} is a link, not a folder")
    if not folder.exists():
        raise InputError(f"{folder} does not exist")
    if not is_sealed(folder):
        raise InputError(f"{path} is missing: the save did not finish, or the file was removed")
    size = _size(path)
    if size is None or size > _LIMIT:
        raise InputError(f"{path} is damaged: it is not a regular file of at most {_LIMIT} bytes")
    try:
        manifest = parse(path.read_bytes())
    except _damage_errors(path) as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    if manifest is None:
        raise InputError(f"{path} is damaged: its content is not what was saved")
    if manifest["step"] != step:
        raise InputError(f"{folder} is damaged: it holds what was saved as {manifest['step']}, not {step}")
    return manifest


def is_sealed(folder: epath.Path) -> bool:
    """Whether there is a manifest, whatever its content."""
    # If the bucket is out of reach, a listing raises. Asking whether the object exists would return False.
    if buckets.in_bucket(folder):
        return MANIFEST in buckets.objects(folder)
    return os.path.lexists(folder / MANIFEST)


def damage(folder: epath.Path, step: int, advance: Advance) -> list[str]:
    """Returns a line for each file that differs from what was sealed; empty if all are good.

    A file of another size than when it was saved is not read.

    Args:
      folder: the folder.
      step: the step that it must hold, or the restarts of a base.
      advance: called with the number of bytes of each chunk that was hashed.
    """
    try:
        want = read(folder, step)["files"]
    except InputError as error:
        return [str(error)]
    have = sizes(folder)
    names = sorted(want.keys() | have.keys())

    def check(name: str) -> str:
        if name not in want:
            return "does not belong to the checkpoint; remove it"
        return _problem(folder / name, want[name], have[name], advance) if name in have else "is missing"

    with concurrent.futures.ThreadPoolExecutor(_HASHERS) as pool:
        problems = dict(zip(names, pool.map(check, names), strict=True))
    return [f"{folder / name} {problem}" for name, problem in problems.items() if problem]


def sizes(folder: epath.Path) -> dict[str, int | None]:
    """Returns the bytes of every file but the manifest, by relative path; None for a link, pipe or device.

    A folder that is a link has no files.
    """
    if buckets.in_bucket(folder):
        found = {name: there.size for name, there in buckets.objects(folder).items()}
    else:
        found = {path.relative_to(folder).as_posix(): _size(path) for path in _walk(folder)}
    return {name: found[name] for name in sorted(found) if name != MANIFEST}


def is_link(path: epath.Path) -> bool:
    """Whether a path is a symbolic link. No save makes one."""
    return not buckets.in_bucket(path) and Path(path).is_symlink()


def render(manifest: Json) -> str:
    """Returns the only text that a manifest can have, its own hash included: any change is detected."""
    return json.dumps(manifest | {"sha256": identity(manifest)}, sort_keys=True, indent=1) + "\n"


def identity(manifest: Json) -> str:
    """Returns a manifest's hash, which is one of all that its folder holds."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True, allow_nan=False).encode()).hexdigest()


def parse(content: bytes) -> Json | None:
    """Returns the manifest, None unless it is well formed and its own hash is right."""
    try:
        manifest = json.loads(content)
        del manifest["sha256"]
        intact = render(manifest).encode() == content
        files = manifest["files"].values()
        well_formed = all(type(f["bytes"]) is int and type(f["sha256"]) is str for f in files)
        well_formed &= manifest.keys() - {"base"} == {"step", "meta", "arrays", "files"}
        if "base" in manifest:
            base.from_json(manifest["base"])
        well_formed &= all(type(a) is str for a in manifest["arrays"].values())
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return manifest if intact and well_formed else None


def _damage_errors(path: epath.Path) -> type[OSError]:
    """Returns the errors that mean damage. In a bucket, most others mean that it is out of reach."""
    return FileNotFoundError if buckets.in_bucket(path) else OSError


def _walk(folder: epath.Path) -> list[epath.Path]:
    """Returns every file and link below a folder, sorted. Links are not followed."""
    found = []
    for root, folders, names in folder.walk() if not is_link(folder) else ():
        found += [root / name for name in names] + [root / n for n in folders if is_link(root / n)]
    return sorted(found)


def _size(path: epath.Path) -> int | None:
    """Returns the bytes of a regular file; None for anything else, and for what was removed meanwhile."""
    if buckets.in_bucket(path):
        try:
            return path.stat().length
        except FileNotFoundError:
            return None
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _fingerprint(path: epath.Path) -> Json:
    size = 0

    def count(n: float) -> None:
        nonlocal size
        size += int(n)

    digest = sha256(path, count)
    sync(path)
    return {"bytes": size, "sha256": digest}


def _problem(path: epath.Path, want: Json, size: int | None, advance: Advance) -> str:
    if size is None:
        return "is damaged: it is not a regular file"
    if want["bytes"] != size:
        return f"is damaged: it has {size} bytes and was saved with {want['bytes']}"
    try:
        same = sha256(path, advance) == want["sha256"]
    except _damage_errors(path) as error:
        return f"cannot be read: {error.strerror or error}"
    return "" if same else "is damaged: its content is not what was saved"
