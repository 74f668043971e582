"""The config of a run: a frozen dataclass of sections that checks its values.

A config file is YAML with the same nesting. Scalar fields are also flags (`--optimizer.learning-rate 1e-3`).
"""

import bisect
import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import tyro

from mora_jax import transform
from mora_jax.errors import InputError
from mora_jax.methods import METHODS, Method, MoRA
from mora_jax.models.attention import check_splash
from mora_jax.models.llama import Compute, LlamaConfig
from mora_jax.on import On, choice_from_json, choice_to_json, method_of
from train.config import method as method_section
from train.config.method import WITHOUT_ADAPTERS, MethodChoice
from train.config.paths import spell_out
from train.config.sections import (
    MOST_SEQUENCES,
    BadSteps,
    Checkpoint,
    Compilation,
    Data,
    Distributed,
    Evaluation,
    GroupRule,
    Log,
    Mesh,
    Optimizer,
    Params,
    Restart,
    Schedule,
    at_least,
    number,
)

Rule = tuple[str, "Method | On | str"]
Group = tuple[str, GroupRule]
DEFAULT_METHOD = MoRA(align=128)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One pretraining run.

    Attributes:
      run_dir: folder that the run is written to, on a disk or in a bucket of gs:// or s3://.
      seed: seed of the initialisation, the order of the data and the restarts.
      steps: optimizer steps of the run.
      epochs: how often the run reads its training rows, instead of steps; 0 to count steps.
      batch_size: sequences per optimizer step, over all devices.
      microbatches: parts that a batch is computed in, one after another (gradient accumulation).
      init_from: run, Hugging Face folder or id of a model on the Hub (org/name, org/name@revision) to start
        from instead of random weights; empty for none.
      adapter: folder of an adapter of PEFT or of MoRA's authors, or its id on the Hub, that is trained
        further. What is adapted and how comes from it, and init_from is its base; empty for none.
      base_dtype: type in which parameters that are not trained are held: adapted kernels and frozen ones.
        bfloat16 takes half the memory; adapters, trained parameters and the optimizer stay float32.
      model: architecture and sizes.
      compute: how the model is computed.
      data: the prepared text.
      method: how adapted kernels are updated. The flags are those of the method that --method.name or the
        config file names, and of its operator. If a flag changes the method or the operator, the file's
        fields that the new one lacks are dropped.
      params: which parameters are adapted, and which are trained themselves.
      optimizer: AdamW or Muon.
      schedule: the learning rate over the run.
      restart: restarts of ReMoRA and ReLoRA.
      bad_steps: updates that are skipped.
      eval: perplexity on the validation split.
      checkpoint: how often checkpoints are saved, and which are kept.
      deterministic: a resumed run computes the same bits on a GPU, too, as it always does elsewhere. Compiled
        programs are then kept in the run's folder, some are slower, and attention is not cuDNN's.
      compilation: the cache of compiled programs.
      log: logs besides JSON lines and TensorBoard.
      mesh: the devices in three axes.
      distributed: the processes of the run.
      rules: (regex of paths, method | "train" | "frozen"), first match wins; YAML and Python only, instead
        of `method` and `params`.
    """

    run_dir: str = "runs/run"
    seed: int = 0
    steps: int = 10_000
    epochs: float = 0.0
    batch_size: int = 1024
    microbatches: int = 1
    init_from: str = ""
    adapter: str = ""
    base_dtype: Literal["float32", "bfloat16"] = "float32"
    model: LlamaConfig = dataclasses.field(default_factory=LlamaConfig)
    compute: Compute = dataclasses.field(default_factory=Compute)
    data: Data = dataclasses.field(default_factory=Data)
    method: MethodChoice = DEFAULT_METHOD
    params: Params = dataclasses.field(default_factory=Params)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    restart: Restart = dataclasses.field(default_factory=Restart)
    bad_steps: BadSteps = dataclasses.field(default_factory=BadSteps)
    eval: Evaluation = dataclasses.field(default_factory=Evaluation)
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    deterministic: bool = False
    compilation: Compilation = dataclasses.field(default_factory=Compilation)
    log: Log = dataclasses.field(default_factory=Log)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    distributed: Distributed = dataclasses.field(default_factory=Distributed)
    rules: Annotated[tuple[Rule, ...], tyro.conf.Suppress] = ()

    def __post_init__(self) -> None:
        spell_out(self, "", "run_dir", optional=("init_from", "adapter"))
        if self.adapter and not self.init_from:
            raise InputError("adapter needs init_from, the model that the adapter belongs to")
        if not 0 <= self.seed < 2**32:  # JAX's keys distinguish no more
            raise InputError(f"seed must lie in [0, 2**32), not {self.seed}")
        at_least("steps", self.steps, 1)
        at_least("batch_size", self.batch_size, 1, MOST_SEQUENCES)
        at_least("microbatches", self.microbatches, 1)
        if self.batch_size % self.microbatches:
            raise InputError(
                f"batch_size {self.batch_size} does not divide into {self.microbatches} microbatches"
            )
        at_least("epochs", self.epochs, 0)
        if self.schedule.warmup > self.steps and not self.epochs:
            raise InputError(
                f"schedule.warmup {self.schedule.warmup} is longer than the run of {self.steps} steps"
            )
        extends = self.model.rope.type == "dynamic"
        if self.data.sequence_length > self.model.max_position_embeddings and not extends:
            raise InputError(
                f"data.sequence_length {self.data.sequence_length} is longer than "
                f"model.max_position_embeddings {self.model.max_position_embeddings}"
            )
        if self.data.document_mask and extends:
            raise InputError(
                "data.document_mask excludes model.rope.type dynamic, which scales by the length of a row"
            )
        if self.compute.attention == "splash":
            check_splash(self.data.sequence_length)
        if isinstance(self.method, str) and self.method not in WITHOUT_ADAPTERS:
            raise InputError(f"method is a Method, full or frozen, not {self.method!r}")
        if self.rules and (self.method != DEFAULT_METHOD or self.params != Params()):
            raise InputError("give either rules or method.* and params.*, not both")
        if self.deterministic and self.compilation.cache != "auto":
            raise InputError(
                "deterministic keeps compiled programs in the run's folder; leave compilation.cache at auto"
            )
        if self.deterministic and self.compute.attention == "cudnn":
            # With jaxlib 0.11.2 the first step ends in an IndexError of XLA at every head width tried.
            raise InputError(
                "deterministic excludes compute.attention cudnn, whose backward pass is not, and which XLA "
                "cannot run deterministically; use xla"
            )
        self._check_restarts()
        if self.base_dtype != "float32":
            self._check_base()

    def _check_base(self) -> None:
        """Raises InputError for what a base of lower precision than float32 would do wrong or ignore."""
        if self.restart.every:
            raise InputError(
                f"restart.every merges updates into the base, and base_dtype {self.base_dtype} would round "
                "small ones away (72% of a dW of 1e-5 an entry); leave base_dtype at float32, or "
                "restart.every at 0"
            )
        if all(choice == "train" for _, choice in self.parameter_rules()):
            raise InputError(f"base_dtype {self.base_dtype} is for what is not trained, and everything is")
        path = self.compute.adapter_path
        if path not in ("auto", "activation"):
            raise InputError(
                f"compute.adapter_path {path} merges into the kernels, which needs base_dtype float32, not "
                f"{self.base_dtype}"
            )

    def _check_restarts(self) -> None:
        if self.schedule.kind == "jagged-cosine" and not self.restart.every:
            raise InputError("schedule.kind jagged-cosine needs restart.every above 0")
        if not self.restart.every:
            if self.restart.growth != 1:
                raise InputError("restart.growth needs restart.every above 0")
            return
        if self.schedule.kind == "jagged-cosine" and self.schedule.warmup > self.restart.every:
            raise InputError(
                f"schedule.warmup {self.schedule.warmup} is longer than restart.every {self.restart.every}"
            )
        if self.optimizer.matrices == "muon" and self.restart.optimizer != "reset":
            raise InputError(
                f"restart.optimizer {self.restart.optimizer} needs Adam's moments, and optimizer.matrices "
                "muon keeps none; leave restart.optimizer at reset"
            )
        adapted = self._methods()
        if not adapted or not all(m.additive for m in adapted):
            additive = ", ".join(name for name, method in METHODS.items() if method.additive)
            raise InputError(f"restart.every needs methods with an update to merge: {additive}")

    def warnings(self) -> list[str]:
        """Returns a sentence for each setting that is allowed but probably not meant."""
        found: list[str] = []
        if self.restart.every:
            found += sorted({method.restart_warning() for method in self._methods()} - {""})
        if self.compute.layers == "scan" and self.compute.remat == "none":
            found.append(
                "compute.layers scan with compute.remat none keeps every intermediate value of a layer; "
                "compute.remat dots keeps the products only"
            )
        if 0 < self.restart.every <= self.bad_steps.window:
            found.append(
                "no spike of the gradient can be detected in cycles as short as the first: bad_steps.window "
                f"{self.bad_steps.window} is not full before the next restart; "
                f"choose one below restart.every {self.restart.every}"
            )
        return found

    def _methods(self) -> list[Method]:
        found = [method_of(choice) for _, choice in self.parameter_rules()]
        return [method for method in found if method]

    def parameter_rules(self) -> transform.Rules:
        """Returns the rules for `mora_jax.assign`, from `rules` or from `method` and `params`."""
        if self.rules:
            return self.rules  # pyright: ignore[reportReturnType]
        if self.method == "full":
            return ((".*", "train"),)
        adapt: transform.Rules = () if self.method == "frozen" else ((self.params.adapt, self.method),)
        train: transform.Rules = ((self.params.train, "train"),) if self.params.train else ()
        return (*adapt, *train, (".*", "frozen"))

    def tokens_per_step(self) -> int:
        """Returns the tokens of one optimizer step."""
        return self.batch_size * self.data.sequence_length

    def rows_before(self, step: int) -> int:
        """Returns how many rows, in the order of the seed, come before optimizer step `step`."""
        return self.data.skip_rows + step * self.batch_size

    def repeats(self, rows: int) -> float:
        """Returns how often the run reads a data set of so many training rows."""
        return self.steps * self.batch_size / rows

    def in_steps(self, rows: int) -> "RunConfig":
        """Returns the config with steps in the place of epochs, for a data set of so many training rows.

        Raises:
          InputError: as for a config with these steps.
        """
        if not self.epochs:
            return self
        return dataclasses.replace(
            self, steps=max(1, round(self.epochs * rows / self.batch_size)), epochs=0.0
        )

    def restarts_before(self, step: int) -> int:
        """Returns the number of restarts before that of optimizer step `step` (from 0), if it has one."""
        return bisect.bisect_left(self.restart.starts(max(step, self.steps)), step)

    def restarts_at(self, step: int) -> bool:
        """Returns whether a restart precedes optimizer step `step` (from 0)."""
        return step in self.restart.starts(self.steps)


def to_plain(config: Any) -> dict[str, Any]:
    """Returns a config, or a section of one, as nested plain data, as YAML and JSON hold it."""
    return {f.name: _plain(f.name, getattr(config, f.name)) for f in dataclasses.fields(config)}


def rules_from_plain(data: Any) -> tuple[Rule, ...]:
    """Returns the rules that `to_plain` made plain. Raises InputError for anything else."""
    pairs = _pairs("rules", data, "method | train | frozen")
    return tuple((regex, choice_from_json(choice)) for regex, choice in pairs)


def groups_from_plain(data: Any) -> tuple[Group, ...]:
    """Returns the optimizer groups that `to_plain` made plain. Raises InputError for anything else."""
    form = "{lr_scale: NUMBER, weight_decay: NUMBER}"
    known = {field.name for field in dataclasses.fields(GroupRule)}
    groups = []
    for regex, rule in _pairs("optimizer.groups", data, form):
        if not isinstance(rule, Mapping) or not rule or rule.keys() - known:
            raise InputError(f"optimizer.groups: {regex} has {form}, or one of them, not {rule!r}")
        given = {k: number(f"{k} of optimizer.groups", v) for k, v in rule.items() if v is not None}
        groups.append((regex, GroupRule(**given)))
    return tuple(groups)


def _plain(name: str, value: Any) -> Any:
    match name:
        case "method":
            return method_section.to_plain(value)
        case "rules":
            return [[regex, choice_to_json(choice)] for regex, choice in value]
        case "groups":
            return [[regex, dataclasses.asdict(rule)] for regex, rule in value]
    return to_plain(value) if dataclasses.is_dataclass(value) else value


def _pairs(name: str, data: Any, form: str) -> list[list[Any]]:
    if not isinstance(data, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in data
    ):
        raise InputError(f"{name} is a list of pairs [regex, {form}]")
    return data
