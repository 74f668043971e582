"""Paths as users give them, in a config or as flags of a command."""

from collections.abc import Sequence
from typing import Any

from mora_jax.io import path_of

# What stands before the name of a data set of TFDS, which may be a path.
_TFDS = "tfds:"
_HUB = "hf://datasets/"  # and before that of one on the Hugging Face Hub


def spell_out(given: Any, prefix: str, *fields: str, optional: Sequence[str] = ()) -> None:
    """Replaces `~` by the home folder in the paths of a frozen dataclass that is being made.

    Args:
      given: the dataclass.
      prefix: what stands before a field in messages: "--", or a section such as "data.".
      fields: those that hold a path, or a tuple of paths.
      optional: those that may also be empty.

    Raises:
      InputError: naming the field, for what is no path on a disk or in a bucket.
    """
    for field in (*fields, *optional):
        name, value = f"{prefix}{field}", getattr(given, field)
        if prefix == "--":
            name = name.replace("_", "-")
        if isinstance(value, tuple):
            object.__setattr__(given, field, tuple(_spelled(name, path) for path in value))
        elif value or field not in optional:
            object.__setattr__(given, field, _spelled(name, value))


def _spelled(name: str, path: str) -> str:
    if path.startswith(_HUB):
        return path
    start = _TFDS if path.startswith(_TFDS) else ""
    found = path_of(path.removeprefix(start), name)
    return start + str(found) if path.startswith(f"{start}~") else path
