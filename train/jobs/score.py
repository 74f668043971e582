"""The validation score of a run or of an exported model."""

import math
from typing import Literal

from mora_jax import hf
from mora_jax.errors import InputError
from mora_jax.models.llama import Compute, Llama
from mora_jax.transform import Methods
from train.config.sections import Evaluation
from train.data.rows.info import DataInfo, load_info
from train.jobs.evaluate import Score, evaluate
from train.run.folder import read_config
from train.run.model import load_model, widest_mesh


def score_path(path: str, data: str, how: Evaluation, dtype: Literal["bfloat16", "float32"]) -> Score:
    """Returns the score of a merged model on the validation split of a data set.

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
    params, model = load_model(path, info, mesh)
    score = evaluate(Llama(model, Compute(dtype=dtype)), Methods(()), params, {}, info, how, mesh)
    if not math.isfinite(score.loss):
        raise InputError(
            f"{path}: the loss on {info.directory} is {score.loss}, so its weights are no model: they hold "
            "NaN or are too large; evaluate another checkpoint or folder"
        )
    return score


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
