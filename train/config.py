"""Everything that a run depends on: frozen dataclasses, checked where they are built.

A config file is YAML with the same nesting. Scalar fields are also flags (`--optimizer.learning-rate 1e-3`).
"""

import dataclasses
import math
from typing import Annotated, Any, Literal

import tyro

from mora_jax import methods as method_table
from mora_jax import transform
from mora_jax.errors import InputError
from mora_jax.llama import Compute, LlamaConfig
from mora_jax.methods import Decouple, DoRA, LoRA, Method, MoRA, Operator, Rotate, Share, Truncate

LINEARS = "layers/.*_proj/kernel"
REST = "embed_tokens/embedding|(layers/)?[a-z_]*norm/scale|lm_head/kernel"


def _at_least(name: str, value: float, least: float) -> None:
    if not least <= value < math.inf:
        raise InputError(f"{name} must be at least {least}, not {value}")


def _above(name: str, value: float, bound: float) -> None:
    if not bound < value < math.inf:
        raise InputError(f"{name} must be above {bound}, not {value}")


@dataclasses.dataclass(frozen=True)
class Data:
    """Where the prepared text is.

    Attributes:
      directory: data set made by `mora prepare-data`, a local or mounted folder.
      sequence_length: tokens of a row; must be the data set's.
    """

    directory: str = "data/c4"
    sequence_length: int = 512

    def __post_init__(self) -> None:
        _at_least("data.sequence_length", self.sequence_length, 2)


@dataclasses.dataclass(frozen=True)
class MethodFlags:
    """The common case of rules as plain flags: one method for all adapted kernels.

    Attributes:
      name: "full" trains every parameter itself; "frozen" adapts nothing.
      rank: LoRA's and DoRA's rank; for MoRA the rank whose parameter count is matched.
      alpha: LoRA, DoRA: the update is scaled by alpha / rank.
      rslora: LoRA: scaled by alpha / sqrt(rank) instead.
      b_lr_scale: LoRA: the learning rate of B over that of A (LoRA+).
      train_factors: LoRA: which factors are trained; with "b" A stays as it was drawn (AsyLoRA).
      a_init: LoRA: how A is drawn.
      operator: MoRA: how widths are compressed and decompressed.
      group: MoRA, share: group type at the start, 0 strided or 1 contiguous.
      cycle: MoRA, share: group types that restarts go through, the paper's 2 or all 4 pairs.
      pad: MoRA: how inputs that r_hat does not divide are padded.
      surplus: MoRA, decouple and rotate: what becomes of surplus input blocks.
      align: MoRA: m is stored padded to a multiple of this.
      dropout: LoRA, MoRA: share of the adapter's inputs zeroed in training.
      adapt: regex of the kernels that get an adapter.
      train: regex of the parameters that are trained themselves; empty for none.
    """

    name: Literal["full", "frozen", "lora", "dora", "mora"] = "mora"
    rank: int = 128
    alpha: float = 128.0
    rslora: bool = False
    b_lr_scale: float = 1.0
    train_factors: Literal["ab", "b"] = "ab"
    a_init: Literal["uniform", "orthogonal", "normal"] = "uniform"
    operator: Literal["truncate", "share", "decouple", "rotate"] = "share"
    group: Literal[0, 1] = 0
    cycle: Literal[2, 4] = 2
    pad: Literal["zero", "wrap"] = "zero"
    surplus: Literal["fold", "drop"] = "fold"
    align: int = 128
    dropout: float = 0.0
    adapt: str = LINEARS
    train: str = REST

    def __post_init__(self) -> None:
        self.method()

    def method(self) -> Method | Literal["train", "frozen"]:
        """What these flags say of an adapted kernel."""
        if self.name == "lora":
            return LoRA(
                self.rank,
                self.alpha,
                self.rslora,
                self.b_lr_scale,
                self.train_factors,
                self.a_init,
                self.dropout,
            )
        if self.name == "dora":
            return DoRA(self.rank, self.alpha)
        if self.name == "mora":
            return MoRA(self.rank, self._operator(), self.align, self.dropout)
        return "train" if self.name == "full" else "frozen"

    def _operator(self) -> Operator:
        if self.operator == "share":
            return Share(self.group, self.pad, self.cycle)
        blocks = {"decouple": Decouple, "rotate": Rotate}
        return blocks[self.operator](self.pad, self.surplus) if self.operator in blocks else Truncate()


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW.

    Attributes:
      learning_rate: the peak rate.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled decay of all trained arrays but the scales of norms and DoRA's magnitudes, per
        unit of learning rate.
      clip_norm: largest global norm of the gradient; 0 does not clip.
    """

    learning_rate: float = 5e-4
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        _above("optimizer.learning_rate", self.learning_rate, 0)
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"optimizer.{name} must lie in [0, 1), not {getattr(self, name)}")
        _above("optimizer.eps", self.eps, 0)
        _at_least("optimizer.weight_decay", self.weight_decay, 0)
        _at_least("optimizer.clip_norm", self.clip_norm, 0)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How the learning rate goes over the run.

    Attributes:
      kind: shape after the warm-up; jagged-cosine warms up again after every restart.
      warmup: optimizer steps of linear warm-up from 0.
      min_ratio: the rate at the end, as a share of the peak.
    """

    kind: Literal["linear", "cosine", "jagged-cosine"] = "cosine"
    warmup: int = 1000
    min_ratio: float = 0.1

    def __post_init__(self) -> None:
        _at_least("schedule.warmup", self.warmup, 0)
        if not 0 <= self.min_ratio <= 1:
            raise InputError(f"schedule.min_ratio must lie in [0, 1], not {self.min_ratio}")


@dataclasses.dataclass(frozen=True)
class Restart:
    """Merge, re-initialise, switch the group type: ReMoRA and ReLoRA.

    Attributes:
      every: optimizer steps between restarts; 0 for none.
      warmup: optimizer steps of linear warm-up after a restart.
      optimizer: the adapters' Adam state: "reset" zeroes moments and count; "magnitude" and "random" zero a
        share of the entries of each moment, the smallest or any, and keep the count.
      prune: that share, in (0, 1]; not used by "reset".
    """

    every: int = 0
    warmup: int = 50
    optimizer: Literal["reset", "magnitude", "random"] = "reset"
    prune: float = 0.9

    def __post_init__(self) -> None:
        _at_least("restart.every", self.every, 0)
        _at_least("restart.warmup", self.warmup, 0)
        if not 0 < self.prune <= 1:
            raise InputError(f"restart.prune must lie in (0, 1], not {self.prune}")
        if 0 < self.every <= self.warmup:
            raise InputError(f"restart.warmup {self.warmup} must be shorter than restart.every {self.every}")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Perplexity on the validation split.

    Attributes:
      every: optimizer steps between evaluations; 0 for the end only.
      batch_size: sequences a batch.
      max_batches: batches an evaluation reads; 0 for the whole split.
    """

    every: int = 1000
    batch_size: int = 64
    max_batches: int = 0

    def __post_init__(self) -> None:
        _at_least("eval.every", self.every, 0)
        _at_least("eval.batch_size", self.batch_size, 1)
        _at_least("eval.max_batches", self.max_batches, 0)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What is kept.

    Attributes:
      every: optimizer steps between checkpoints; 0 for the end only.
      keep: newest checkpoints to keep; 0 for all.
    """

    every: int = 1000
    keep: int = 2

    def __post_init__(self) -> None:
        _at_least("checkpoint.every", self.every, 0)
        _at_least("checkpoint.keep", self.keep, 0)


@dataclasses.dataclass(frozen=True)
class Log:
    """Who is told. JSON lines and TensorBoard are always written.

    Attributes:
      wandb: Weights & Biases project; empty for none.
    """

    wandb: str = ""


@dataclasses.dataclass(frozen=True)
class Mesh:
    """How the devices are laid out.

    Attributes:
      data: devices among which a batch is divided; -1 for all there are.
    """

    data: int = -1

    def __post_init__(self) -> None:
        if self.data != -1:
            _at_least("mesh.data", self.data, 1)


Rule = tuple[str, "Method | str"]


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One pretraining run.

    Attributes:
      run_dir: folder the run is written to.
      seed: of the initialisation, the order of the data and the restarts.
      steps: optimizer steps.
      batch_size: sequences of an optimizer step, over all devices.
      microbatches: parts that a batch is computed in, one after another (gradient accumulation).
      init_from: Hugging Face folder or run to start from instead of random weights; empty for none.
      model: what the model is.
      compute: how it is computed.
      data: where the prepared text is.
      method: the common case of rules as plain flags.
      optimizer: AdamW.
      schedule: how the learning rate goes.
      restart: ReMoRA's and ReLoRA's restarts.
      eval: perplexity on the validation split.
      checkpoint: what is kept.
      log: who is told.
      mesh: how the devices are laid out.
      rules: (regex of paths, method | "train" | "frozen"), first match wins; YAML and Python only, instead
        of `method`.
    """

    run_dir: str = "runs/run"
    seed: int = 0
    steps: int = 10_000
    batch_size: int = 1024
    microbatches: int = 1
    init_from: str = ""
    model: LlamaConfig = dataclasses.field(default_factory=LlamaConfig)
    compute: Compute = dataclasses.field(default_factory=Compute)
    data: Data = dataclasses.field(default_factory=Data)
    method: MethodFlags = dataclasses.field(default_factory=MethodFlags)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    restart: Restart = dataclasses.field(default_factory=Restart)
    eval: Evaluation = dataclasses.field(default_factory=Evaluation)
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    log: Log = dataclasses.field(default_factory=Log)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    rules: Annotated[tuple[Rule, ...], tyro.conf.Suppress] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:  # what JAX's keys can tell apart
            raise InputError(f"seed must lie in [0, 2**32), not {self.seed}")
        _at_least("steps", self.steps, 1)
        _at_least("batch_size", self.batch_size, 1)
        _at_least("microbatches", self.microbatches, 1)
        if self.batch_size % self.microbatches:
            raise InputError(
                f"batch_size {self.batch_size} does not divide into {self.microbatches} microbatches"
            )
        if self.schedule.warmup > self.steps:
            raise InputError(
                f"schedule.warmup {self.schedule.warmup} is longer than the run of {self.steps} steps"
            )
        if self.data.sequence_length > self.model.max_position_embeddings:
            raise InputError(
                f"data.sequence_length {self.data.sequence_length} is longer than "
                f"model.max_position_embeddings {self.model.max_position_embeddings}"
            )
        if self.rules and self.method != MethodFlags():
            raise InputError("give either rules or method.* fields, not both")
        self._check_restarts()

    def _check_restarts(self) -> None:
        if self.schedule.kind == "jagged-cosine" and not self.restart.every:
            raise InputError("schedule.kind jagged-cosine needs restart.every above 0")
        if not self.restart.every:
            return
        if self.schedule.kind == "jagged-cosine" and self.schedule.warmup > self.restart.every:
            raise InputError(
                f"schedule.warmup {self.schedule.warmup} is longer than restart.every {self.restart.every}"
            )
        adapted = [choice for _, choice in self.parameter_rules() if isinstance(choice, Method)]
        if not adapted or not all(m.additive for m in adapted):
            raise InputError("restart.every needs methods with an update to merge: mora or lora")

    def warnings(self) -> list[str]:
        """What is allowed but probably not meant, a sentence each."""
        operators = (
            {c.operator for _, c in self.parameter_rules() if isinstance(c, MoRA)}
            if self.restart.every
            else ()
        )
        return [
            f"operator {o.name} has one pattern only: restarts add no rank to the sum of updates"
            for o in operators
            if o.switched() == o
        ]

    def parameter_rules(self) -> transform.Rules:
        """The rules for `mora_jax.assign`, from `rules` or from `method`."""
        if self.rules:
            return self.rules  # pyright: ignore[reportReturnType]
        flags = self.method
        if flags.name == "full":
            return ((".*", "train"),)
        adapt: transform.Rules = () if flags.name == "frozen" else ((flags.adapt, flags.method()),)
        train: transform.Rules = ((flags.train, "train"),) if flags.train else ()
        return (*adapt, *train, (".*", "frozen"))

    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step reads."""
        return self.batch_size * self.data.sequence_length

    def restarts_before(self, step: int) -> int:
        """How many restarts happened before the restart, if any, of optimizer step `step` (from 0)."""
        return max(step - 1, 0) // self.restart.every if self.restart.every else 0

    def restarts_at(self, step: int) -> bool:
        """Whether a restart happens just before optimizer step `step` (from 0)."""
        return bool(self.restart.every) and 0 < step < self.steps and step % self.restart.every == 0


def to_plain(config: Any) -> dict[str, Any]:
    """A config as nested plain data, as YAML and JSON hold it."""
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "rules":
            value = [[regex, _plain_choice(choice)] for regex, choice in value]
        plain[field.name] = to_plain(value) if dataclasses.is_dataclass(value) else value
    return plain


def rules_from_plain(data: Any) -> tuple[Rule, ...]:
    """The inverse of what `to_plain` makes of rules. Raises InputError for anything else."""
    if not isinstance(data, list) or not all(isinstance(r, list) and len(r) == 2 for r in data):
        raise InputError("rules is a list of pairs [regex, method | train | frozen]")
    return tuple((str(regex), transform.choice_from_json(choice)) for regex, choice in data)


def _plain_choice(choice: Any) -> Any:
    return method_table.to_json(choice) if isinstance(choice, Method) else choice
