"""A folder that appears complete or not at all."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator

from etils import epath

from mora_jax.errors import InputError
from mora_jax.hf.config import CONFIG
from mora_jax.io import path_of


@contextlib.contextmanager
def whole_folder(path: epath.PathLike) -> Iterator[epath.Path]:
    """Yields a temporary folder to fill, which is renamed to `path` when the block ends without an error.

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
            for file in sorted(folder.iterdir(), key=lambda file: file.name == CONFIG):
                with file.open("rb") as source, (target / file.name).open("wb") as copy:
                    shutil.copyfileobj(source, copy, 1 << 24)
        return
    partial = target.parent / f"{target.name}.partial"
    partial.rmtree(missing_ok=True)
    partial.mkdir(parents=True)
    yield partial
    if target.exists():
        target.rmdir()
    partial.rename(target)
