"""What a step computes, as the static argument that compiled steps are cached by."""

import dataclasses
from typing import Literal

from mora_jax.models.llama import Compute, LlamaConfig
from train.config.run import RunConfig
from train.config.sections import BadSteps, Optimizer, Restart, Schedule


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """The part of a config that the compiled steps depend on, and nothing else.

    Attributes:
      model: sizes and options of the model.
      compute: how the model is computed.
      optimizer: AdamW, Muon and their parameter groups.
      schedule: the learning rate over the run.
      restart: when restarts happen and what they do to the optimizer state.
      bad_steps: which updates are skipped.
      steps: optimizer steps of the run.
      microbatches: parts that a batch is computed in, one after another.
      seed: seed of the initialisation, of dropout and of pruning.
      base_dtype: type in which parameters that are not trained are held.
    """

    model: LlamaConfig
    compute: Compute
    optimizer: Optimizer
    schedule: Schedule
    restart: Restart
    bad_steps: BadSteps
    steps: int
    microbatches: int
    seed: int
    base_dtype: Literal["float32", "bfloat16"]


def spec_of(config: RunConfig) -> StepSpec:
    """Returns what the steps of a run depend on."""
    return StepSpec(**{field.name: getattr(config, field.name) for field in dataclasses.fields(StepSpec)})
