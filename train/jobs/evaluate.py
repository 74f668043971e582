"""Perplexity on the validation split."""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from mora_jax import sharding
from mora_jax.errors import InputError
from mora_jax.models.llama import Llama
from mora_jax.transform import Methods
from train.config.run import RunConfig
from train.config.sections import Evaluation
from train.console.progress import progress
from train.data.rows.info import DataInfo
from train.data.rows.read import eval_batches
from train.step.step import eval_step


@dataclasses.dataclass(frozen=True)
class Score:
    """The result of an evaluation.

    Attributes:
      loss: mean next-token loss in nats.
      predictions: tokens predicted.
    """

    loss: float
    predictions: int

    @property
    def perplexity(self) -> float:
        """Returns exp(loss)."""
        return math.exp(min(self.loss, 700.0))


class Abandoned(Exception):
    """An evaluation was stopped early."""


def evaluate(
    model: Llama,
    methods: Methods,
    params: Any,
    adapters: Any,
    info: DataInfo,
    how: Evaluation,
    mesh: Mesh,
    document_mask: bool = False,
    stopping: Callable[[], bool] = lambda: False,
) -> Score:
    """Returns the mean loss over the validation split, or over its first `how.max_batches` batches.

    Args:
      model: the model.
      methods: what is done with each parameter.
      params: its parameters.
      adapters: the adapters' arrays.
      info: the data set.
      how: batch size and number of batches.
      mesh: the devices.
      document_mask: whether each document of joined ones is a sequence of its own.
      stopping: called before each batch; whether to give up.

    Raises:
      Abandoned: if `stopping` returned true.
      InputError: if the data set's vocabulary is larger than the model's, a batch does not divide among the
        devices, or the split is empty.
    """
    check_vocabulary(info, model.config.vocab_size)
    check_divides("eval.batch_size", how.batch_size, mesh)
    rows = info.rows["validation"]
    # Rows that only pad a batch would take memory.
    shards = sharding.batch_shards(mesh)
    how = dataclasses.replace(how, batch_size=min(how.batch_size, max(1, -(-rows // shards)) * shards))
    held = sharding.local_rows(mesh, how.batch_size)
    batches = eval_batches(info, "validation", how.batch_size, how.max_batches or None, held, document_mask)
    total, count, done = 0.0, 0.0, 0
    total_rows = min(rows, how.max_batches * how.batch_size or rows)
    first = jax.process_index() == 0
    shown = progress("evaluating", total_rows, "rows") if first else contextlib.nullcontext(lambda n: None)
    with jax.set_mesh(mesh), shown as advance:
        for batch in batches:
            if stopping():
                raise Abandoned
            on_device = sharding.to_global(mesh, how.batch_size, batch)
            loss, predictions = eval_step(model, methods, params, adapters, on_device)
            total, count = total + float(loss), count + float(predictions)
            advance(min(how.batch_size, total_rows - done))
            done += how.batch_size
    if not count:
        raise InputError(f"{info.directory} has no validation rows")
    return Score(total / count, int(count))


def check_vocabulary(info: DataInfo, vocab_size: int) -> None:
    """Raises InputError if the data set has tokens that the model lacks."""
    if info.vocab_size > vocab_size:
        raise InputError(
            f"{info.directory} has a vocabulary of {info.vocab_size} tokens, "
            f"more than model.vocab_size {vocab_size}"
        )


def check_mesh(config: RunConfig, mesh: Mesh) -> None:
    """Raises InputError if a run's batches or heads cannot be divided equally among the devices."""
    heads, tensor = config.model.num_key_value_heads, mesh.shape["tensor"]
    if heads % tensor:
        raise InputError(f"mesh.tensor {tensor} must divide model.num_key_value_heads {heads}")
    check_divides("batch_size / microbatches", config.batch_size // config.microbatches, mesh)
    check_divides("eval.batch_size", config.eval.batch_size, mesh)


def check_divides(name: str, batch: int, mesh: Mesh) -> None:
    """Raises InputError if a batch cannot be divided equally among the devices."""
    shards = sharding.batch_shards(mesh)
    if batch % shards:
        raise InputError(f"{name} {batch} does not divide among {shards} devices (mesh.data x mesh.fsdp)")
