"""Exports a run as a Hugging Face folder: merged float32 weights, config and tokenizer."""

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

from etils import epath

from mora_jax import hf
from mora_jax.errors import InputError
from mora_jax.hf.tokenizer_files import MODEL
from mora_jax.models.llama import LlamaConfig
from mora_jax.transform import Methods
from train.console.terminal import warn
from train.run.folder import read_config
from train.run.model import load_state, widest_mesh
from train.run.tokenizer import run_tokenizer
from train.storage.files import naming_errors
from train.storage.lock import lock_output


def export(run_dir: str, out: str, dtype: Literal["float32", "bfloat16"] = "float32") -> None:
    """Writes config.json, model.safetensors and the tokenizer's files, from one process.

    The run's data set is not needed. A tokenizer that is missing, or that tokenizer.json cannot express
    exactly, is a warning: the weights are written in any case. The parameters are sharded over all devices,
    in the types that they are trained in. Adapters are merged as they are written. The host holds one layer
    of one kernel at a time.

    Args:
      run_dir: the run, whose newest good checkpoint is used; its adapters are merged in float32.
      out: the folder to write.
      dtype: type of the stored weights; bfloat16 rounds after merging.

    Raises:
      InputError: if another program writes `out`, or `run_dir` holds no run, one without a complete
        checkpoint, or weights that are not finite.
    """
    read_config(run_dir)  # only a run is exported
    with output_folder(out, "OUT") as folder:
        config, state, methods = load_state(run_dir, mesh=widest_mesh(run_dir))
        with naming_errors(out):
            save_model(folder, state.params, config.model, dtype, run_dir, state.adapters, methods)


@contextlib.contextmanager
def output_folder(path: str, flag: str) -> Iterator[epath.Path]:
    """Yields an empty folder, which appears as `path` if the block ends without an error.

    Raises:
      InputError: if another program writes `path`, which `flag` gives.
    """
    with lock_output(path, flag):
        hf.remove_leftovers(path)
        with hf.whole_folder(path) as folder:
            yield folder


def save_model(
    folder: epath.Path,
    params: Any,
    model: LlamaConfig,
    dtype: Literal["float32", "bfloat16"],
    run_dir: str,
    adapters: Any = None,
    methods: Methods = Methods(()),  # noqa: B008 (immutable)
) -> None:
    """Writes parameters with their adapters, and the tokenizer of a run, into an empty folder."""
    tokenizer = run_tokenizer(run_dir)
    hf.save_hf(folder, params, model, dtype, _special_ids(tokenizer), adapters=adapters, methods=methods)
    save_tokenizer(folder, tokenizer, run_dir)


def _special_ids(tokenizer: hf.TokenizerFiles | None) -> dict[str, int]:
    """Returns the ids for config.json; none of a tokenizer that cannot be exported."""
    with contextlib.suppress(InputError):
        return tokenizer.special_ids() if tokenizer else {}
    return {}


def save_tokenizer(folder: epath.Path, tokenizer: hf.TokenizerFiles | None, run_dir: str) -> None:
    """Writes the tokenizer's files, or warns of those that cannot be written: the weights are kept anyway."""
    if tokenizer is None:
        warn([f"no tokenizer is exported: {run_dir} has none, and its data set is away; the weights are"])
        return
    for name, content in tokenizer.exported().items():
        (folder / name).write_bytes(content)
    if tokenizer.encoder != MODEL:
        return
    try:
        hf.save_tokenizer(folder, tokenizer.files[MODEL], tokenizer.config.get("chat_template"))
    except InputError as error:
        warn([f"{error}; the weights and {MODEL} are exported without tokenizer.json"])
