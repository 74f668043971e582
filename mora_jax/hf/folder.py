"""A folder that appears complete or not at all."""

import contextlib
import errno
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from mora_jax.errors import InputError
from mora_jax.hf.adapter_config import ADAPTER_CONFIG
from mora_jax.hf.config import CONFIG
from mora_jax.io import path_of

# Without these a folder is neither a model nor an adapter.
_LAST = (CONFIG, ADAPTER_CONFIG)


@contextlib.contextmanager
def whole_folder(path: epath.PathLike) -> Iterator[epath.Path]:
    """Yields a temporary folder to fill, which is renamed to `path` when the block ends without an error.

    It is a new folder beside `path`, and is removed if there is an error. If `path` is an empty folder, or a
    link to one, the new folder lies in it, and its files are moved up, config.json last.

    A bucket cannot rename: its folder is filled on the local disk and uploaded, config.json last, since a
    folder without it is no model.

    Raises:
      InputError: if `path` exists and is not an empty folder.
    """
    target = path_of(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} exists already; choose another name or remove it")
    if "://" in str(target):
        with tempfile.TemporaryDirectory() as local:
            folder = epath.Path(local) / target.name  # so that a nested `whole_folder` stays in `local` too
            folder.mkdir()
            yield folder
            for file in sorted(folder.iterdir(), key=lambda file: file.name in _LAST):
                with file.open("rb") as source, (target / file.name).open("wb") as copy:
                    shutil.copyfileobj(source, copy, 1 << 24)
        return
    home = target if target.exists() else target.parent
    partial = home / f"{target.name}.{secrets.token_hex(4)}.mora-partial"
    partial.mkdir(parents=True)
    try:
        yield partial
        if home == target:
            _move_up(partial, target)
        else:
            _move(partial, target)
    except BaseException:
        partial.rmtree(missing_ok=True)
        raise


def remove_leftovers(path: epath.PathLike) -> None:
    """Removes what killed programs left of `whole_folder(path)`. No other program may be filling it."""
    target = epath.Path(path)
    if "://" in str(target) or not target.parent.exists():
        return
    leftover = re.compile(rf"{re.escape(target.name)}(\.[0-9a-f]{{8}}\.mora-partial)+")
    for home in (target.parent, *([target] if target.is_dir() else [])):
        for found in home.iterdir():
            if leftover.fullmatch(found.name):
                found.rmtree()


def _move_up(partial: epath.Path, target: epath.Path) -> None:
    """Moves the files of a folder into the one that it lies in, and in which nothing else may lie."""
    if [found.name for found in target.iterdir()] != [partial.name]:
        raise InputError(f"{target} was filled by another program meanwhile; choose another name or empty it")
    for file in sorted(partial.iterdir(), key=lambda file: file.name in _LAST):
        Path(file).rename(target / file.name)
    partial.rmdir()


def _move(partial: epath.Path, target: epath.Path) -> None:
    """Moves a folder to a name that is free, or that of an empty folder."""
    try:
        Path(partial).rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise InputError(
            f"{target} was made by another program meanwhile; choose another name or remove it"
        ) from error
