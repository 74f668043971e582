"""The tokenizer that a run keeps in its folder, so that its model can be exported wherever the data is."""

import contextlib
import hashlib
from collections.abc import Sequence

import jax
from etils import epath

from mora_jax.errors import InputError
from mora_jax.io import read_bytes
from train.data.rows.info import DataInfo
from train.data.rows.layout import TOKENIZER, TOKENIZER_BYTES
from train.run.checkpoint import Checkpoints
from train.run.folder import open_checkpoints, read_config
from train.run.meta import read_meta
from train.storage.files import write_whole


def keep_tokenizer(run_dir: str, info: DataInfo) -> None:
    """Copies the data set's tokenizer into the run's folder. Only process 0 writes."""
    if jax.process_index() == 0 and _read(run_dir, info.tokenizer_sha256) is None:
        content = read_bytes(info.tokenizer, TOKENIZER_BYTES)
        write_whole(epath.Path(run_dir) / TOKENIZER, content)


def run_tokenizer(run_dir: str) -> bytes | None:
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


def _read(folder: str, sha256: str) -> bytes | None:
    """Returns the tokenizer in a folder, None if there is none with this hash."""
    try:
        content = read_bytes(epath.Path(folder) / TOKENIZER, TOKENIZER_BYTES)
    except InputError:
        return None
    return content if hashlib.sha256(content).hexdigest() == sha256 else None
