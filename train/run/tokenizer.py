"""The tokenizer that a run keeps in its folder, so that its model can be exported wherever the data is."""

import contextlib
from collections.abc import Sequence

import jax
from etils import epath

from mora_jax import hf
from mora_jax.errors import InputError
from mora_jax.hf.tokenizer_files import FOLDER
from train.data.rows.info import DataInfo
from train.run.checkpoint import Checkpoints
from train.run.folder import open_checkpoints, read_config
from train.run.meta import read_meta
from train.storage.files import make_folder, write_whole


def keep_tokenizer(run_dir: str, info: DataInfo) -> None:
    """Copies the data set's tokenizer into the run's folder. Only process 0 writes."""
    if jax.process_index() > 0 or _read(run_dir, info.tokenizer_sha256):
        return
    tokenizer, folder = hf.read_tokenizer(info.directory), epath.Path(run_dir) / FOLDER
    make_folder(folder)
    # What encodes comes last: with it the copy is complete.
    for name in sorted(tokenizer.files, key=lambda name: name == tokenizer.encoder):
        write_whole(folder / name, tokenizer.files[name])


def run_tokenizer(run_dir: str) -> hf.TokenizerFiles | None:
    """Returns the tokenizer that a run was trained with, None if neither its folder nor its data has it.

    Raises:
      InputError: if the folder holds no run, or no checkpoint.
    """
    config = read_config(run_dir)
    with open_checkpoints(config) as saved:
        steps = saved.steps()
        if not steps:
            raise InputError(f"{run_dir} holds no complete checkpoint")
        sha256 = _sha256(saved, steps)
    # Runs of earlier versions have none of their own.
    return _read(run_dir, sha256) or _read(config.data.directory, sha256)


def _sha256(saved: Checkpoints, steps: Sequence[int]) -> str:
    for step in reversed(steps):
        with contextlib.suppress(InputError):
            return read_meta(saved, step)["data"]["tokenizer_sha256"]
    return ""


def _read(folder: str, sha256: str) -> hf.TokenizerFiles | None:
    """Returns the tokenizer in a folder, None if there is none with this hash."""
    with contextlib.suppress(InputError):
        found = hf.read_tokenizer(epath.Path(folder))
        return found if found.has_hash(sha256) else None
    return None
