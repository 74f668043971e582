"""Exports a run as a Hugging Face folder: merged float32 weights, config and tokenizer."""

from typing import Any, Literal

from etils import epath

from mora_jax import hf
from mora_jax.models.llama import LlamaConfig
from train.data.rows.info import load_info
from train.run.folder import read_config
from train.run.model import load_model, widest_mesh


def export(
    run_dir: str, out: str, dtype: Literal["float32", "bfloat16"] = "float32"
) -> tuple[Any, LlamaConfig]:
    """Writes config.json, model.safetensors and the tokenizer's files, from one process.

    The state is sharded over all devices. The host holds one layer of one kernel at a time.

    Args:
      run_dir: the run, whose newest good checkpoint is used; its adapters are merged in float32.
      out: the folder to write.
      dtype: type of the stored weights; bfloat16 rounds after merging.

    Returns:
      The merged parameters and the model's config.

    Raises:
      InputError: if the run has no complete checkpoint, its data set is missing, or its tokenizer cannot be
        written as tokenizer.json exactly.
    """
    info = load_info(read_config(run_dir).data.directory, splits=())
    tokenizer = epath.Path(info.tokenizer).read_bytes()
    with hf.whole_folder(out) as folder:
        params, model = load_model(run_dir, info, widest_mesh(run_dir))
        hf.save_hf(folder, params, model, dtype, hf.special_ids(tokenizer))
        hf.save_tokenizer(folder, tokenizer)
    return params, model
