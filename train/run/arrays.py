"""The arrays of a checkpoint: their names, types and shapes, and whether they can be restored."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import tensorstore as ts
from etils import epath

from mora_jax.errors import InputError, reason, some
from train.storage.buckets import in_bucket

# Where orbax puts the arrays, and what TensorStore calls the description of each.
_STATE = "state"
_DESCRIPTIONS = ("/zarr.json", "/.zarray")


def check_restorable(folder: epath.Path, arrays: Iterable[str]) -> None:
    """Raises InputError unless the index that arrays are restored from is there and names exactly these.

    Each process writes an index of what it saved. Orbax merges them at the end, and restores from the merged
    one.

    Args:
      folder: the checkpoint.
      arrays: the paths of its arrays, such as `params/norm/scale`.
    """
    found, wanted = _indexed(folder / _STATE), {_name(path) for path in arrays}
    problems = [f"{name} is missing" for name in sorted(wanted - found)]
    problems += [f"{name} does not belong to it" for name in sorted(found - wanted)]
    if problems:
        raise InputError(f"{folder} cannot be restored: in its merged index of arrays, {some(problems)}")


def layout(tree: Any) -> dict[str, str]:
    """Returns the type and shape of each array, such as `float32[2, 3]`, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in leaves
    }


def check_layout(place: Any, saved: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    """Raises InputError, naming the place, unless two layouts are equal."""
    names = sorted(saved.keys() | wanted.keys())
    problems = [
        f"{n} is {saved.get(n, 'missing')} and must be {wanted.get(n, 'absent')}"
        for n in names
        if saved.get(n) != wanted.get(n)
    ]
    if problems:
        raise InputError(f"{place} holds another state than the config's: {some(problems)}")


def _indexed(place: epath.Path) -> set[str]:
    """Returns the names of the arrays in the merged index of a folder; none if it is missing."""
    # TensorStore takes no path with `..` in it.
    base = f"{place}/" if in_bucket(place) else {"driver": "file", "path": f"{os.path.realpath(place)}/"}
    try:
        store = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
        keys = [key.decode(errors="replace") for key in store.list().result()]
    # Files made to harm can make TensorStore raise anything.
    except Exception as error:
        words = reason(error).partition("[tensorstore_spec")[0].strip()
        raise InputError(
            f"{place} cannot be restored: its index of arrays cannot be read: {words}"
        ) from error
    return {_name(key.removesuffix(end)) for end in _DESCRIPTIONS for key in keys if key.endswith(end)}


def _name(path: str) -> str:
    """Returns an array's name with one kind of separator: orbax joins the keys of a path by dots."""
    return path.replace("/", ".")
