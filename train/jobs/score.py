"""The validation score of a run or of an exported model."""

import math
from typing import Any, Literal

from etils import epath
from jax.sharding import Mesh

from mora_jax import hf
from mora_jax.errors import InputError
from mora_jax.models.config import LlamaConfig
from mora_jax.models.llama import Compute, Llama
from mora_jax.transform import Methods
from train.config.sections import Evaluation
from train.data.rows.info import DataInfo, load_info
from train.jobs.evaluate import Score, evaluate
from train.run.folder import CONFIG, read_config
from train.run.model import load_model, load_state, widest_mesh
from train.runtime.backend import attention_here


def score_path(path: str, data: str, how: Evaluation, dtype: Literal["bfloat16", "float32"]) -> Score:
    """Returns the score of a model on the validation split of a data set, with a run's document mask.

    Model and batches are sharded over all devices, or over as many as divide both.

    Args:
      path: folder of a run, Hugging Face folder, or id of a model on the Hub.
      data: the data set; empty for the run's own.
      how: batch size and number of batches.
      dtype: type of products.

    Raises:
      InputError: if the folder holds no model, is not a run and `data` is empty, or the loss is not finite.
    """
    info = load_info(data, splits=("validation",)) if data else _own_data(path)
    path = str(hf.local_folder(path))
    mesh = widest_mesh(path, how.batch_size)
    model, methods, params, adapters = _loaded(path, info, mesh, dtype)
    mask = (epath.Path(path) / CONFIG).exists() and read_config(path).data.document_mask
    compute = Compute(dtype=dtype, attention=attention_here(model.head_width, dtype))
    score = evaluate(Llama(model, compute), methods, params, adapters, info, how, mesh, mask)
    if not math.isfinite(score.loss):
        raise InputError(
            f"{path}: the loss on {info.directory} is {score.loss}, so its weights are no model: they hold "
            "NaN or are too large; evaluate another checkpoint or folder"
        )
    return score


def _loaded(
    path: str, info: DataInfo, mesh: Mesh, dtype: Literal["bfloat16", "float32"]
) -> tuple[LlamaConfig, Methods, Any, Any]:
    """Returns config, methods, parameters and adapters: merged, or as a run with a bfloat16 base holds them.

    Merged, such a base would take twice the memory that it was trained in. Weights that a folder has in
    bfloat16 are held so for products of this type: these are the same.
    """
    if not (epath.Path(path) / CONFIG).exists():
        params, model = load_model(path, info, mesh, hf.stored_types(path) if dtype == "bfloat16" else None)
        return model, Methods(()), params, {}
    if read_config(path).base_dtype != "float32":
        config, state, methods = load_state(path, info, mesh)
        return config.model, methods, state.params, state.adapters
    params, model = load_model(path, info, mesh)
    return model, Methods(()), params, {}


def _own_data(run_dir: str) -> DataInfo:
    """Returns the data set of a run. Raises InputError, naming --data, if it is not there."""
    try:
        directory = read_config(run_dir).data.directory
    except InputError as error:
        raise InputError(f"{error}; for a Hugging Face folder, --data must name a data set") from error
    try:
        return load_info(directory, splits=("validation",))
    except InputError as error:
        raise InputError(f"{error}; if the run's data set is elsewhere, name it with --data") from error
