"""`mora pretrain`, `mora finetune`, `mora plan`, `mora plan-table`, `mora methods` and `mora demo`."""

import dataclasses
from typing import Annotated

import tyro

from mora_jax.errors import InputError
from mora_jax.methods import MoRA
from mora_jax.models.config import LlamaConfig
from train.cli.commands.arguments import Config
from train.cli.explain import explain
from train.config.paths import spell_out
from train.config.run import RunConfig
from train.console.terminal import print_summary
from train.storage.files import check_free


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """Pretrains a model from a config file, or resumes its run. Flags override the file's values.

    Attributes:
      config: YAML file, such as configs/demo.yaml.
      resume: resume the run in --run-dir if there is one; with --no-resume such a folder is an error.
      dry_run: only show shapes, trainable and frozen parameters, tokens and steps.
    """

    config: Config
    run: Annotated[RunConfig, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
    resume: bool = True
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False


@dataclasses.dataclass(frozen=True)
class Finetune(Pretrain):
    """Fine-tunes a model on prepared examples or text, or resumes its run. Flags override the file's values.

    The loop is that of mora pretrain. The sizes of the model come from --init-from.

    Attributes:
      config: YAML file, such as configs/finetune.yaml.
      resume: resume the run in --run-dir if there is one; with --no-resume such a folder is an error.
      dry_run: only show shapes, trainable and frozen parameters, tokens and steps.
    """


def finetune(command: Finetune) -> None:
    """Runs `mora finetune`."""
    if not command.run.init_from:
        raise InputError("mora finetune needs a model: --init-from FOLDER, or ORG/NAME of the Hub")
    pretrain(command)


def pretrain(command: Pretrain) -> None:
    """Runs `mora pretrain`."""
    if command.dry_run:
        from train.cli.describe import print_description

        print_description(command.run)
    else:
        train(command)


def train(command: Pretrain) -> None:
    """Trains, possibly as one of several processes."""
    import jax

    from train.runtime.preempt import ended_at_once

    with ended_at_once():  # while the rest is imported, which takes a second, JAX's callbacks run too
        from train.jobs.pretrain import pretrain as run
        from train.runtime.distributed import joined

        with joined(command.run.distributed, explain):
            summary = run(command.run, command.resume)
            if jax.process_index() == 0:
                print_summary(summary, command.run.run_dir)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Computes what a config needs of each TPU or GPU, by compiling its training step without any of them.

    Flags override the file's values. Exits with status 1 if the config does not fit.

    Attributes:
      config: YAML file, such as configs/1_3b_remora.yaml.
      topology: devices to compile for, with their own compiler: TPUs such as v5e:16x16, GPUs such as h100:8,
        or h100:4x8 for four machines; empty for none.
      devices: number of devices to plan for instead, simulated by CPU devices; 0 for none.
      memory: memory of one such device, in GiB.
      every_program: also compile the restart and the evaluation. The training step, and what fits
        adapters to gradients where the method does, are always compiled.
      out: JSON file for all figures, in bytes; empty for none.
      overwrite: replace the file of --out if there is one; otherwise it is an error.
    """

    config: Config
    run: Annotated[RunConfig, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
    topology: str = ""
    devices: int = 0
    memory: float = 80.0
    every_program: tyro.conf.FlagCreatePairsOff[bool] = False
    out: str = ""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False

    def __post_init__(self) -> None:
        spell_out(self, "--", optional=("out",))


def plan(command: Plan) -> None:
    """Runs `mora plan`."""
    from train.perf.plan.programs import PROGRAMS, TRAINING
    from train.perf.plan.report import plan as make
    from train.perf.plan.report import show

    check_free(command.out, "--out", command.overwrite)
    programs = tuple(PROGRAMS) if command.every_program else TRAINING
    made = make(command.run, command.topology, command.devices, command.memory, programs)
    show(made, command.config, command.out)
    if made.fits() is False:
        raise SystemExit(1)


@dataclasses.dataclass(frozen=True)
class PlanTable:
    """Prints the plans of several configs on several slices of TPUs as one Markdown table.

    Each config is sharded over all chips of a slice, with compute.remat full and splash attention.

    Attributes:
      configs: YAML files.
      topologies: slices of TPUs, such as v5e:2x4 v5e:16x16.
      sequences: most sequences of a microbatch on one chip.
      out: JSON file of plans; those that it holds are not compiled again.
      state_only: compile nothing; for plans that the file lacks, show the sizes of the state and the formula.
    """

    configs: tuple[str, ...]
    topologies: tuple[str, ...]
    sequences: int = 4
    out: str = "plans.json"
    state_only: tyro.conf.FlagCreatePairsOff[bool] = False

    def __post_init__(self) -> None:
        spell_out(self, "--", "configs", "out")


def plan_table(command: PlanTable) -> None:
    """Runs `mora plan-table`."""
    from train.perf.plan.table import make_table

    slices, compiling = command.topologies, not command.state_only
    print(make_table(command.configs, slices, command.sequences, command.out, compiling))


@dataclasses.dataclass(frozen=True)
class SurveyMethods:
    """Prints a table of methods for a model: trainable parameters, r_hat, attainable rank.

    Attributes:
      rank: rank of LoRA, whose parameter count MoRA matches.
      model: the model; its seven linears are adapted.
    """

    rank: int = 128
    model: Annotated[LlamaConfig, tyro.conf.FlagConversionOff] = dataclasses.field(
        default_factory=LlamaConfig
    )

    def __post_init__(self) -> None:
        MoRA(self.rank)  # raises InputError for a bad rank


def survey_methods(command: SurveyMethods) -> None:
    """Runs `mora methods`."""
    from train.cli.methods import print_survey

    print_survey(command.model, command.rank)


@dataclasses.dataclass(frozen=True)
class Demo:
    """Tokenizes, prepares, pretrains and exports on text of this Python installation.

    Attributes:
      config: YAML file of the run.
      folder: folder for the data and the run; an earlier demo in it is replaced.
    """

    config: str = "configs/demo.yaml"
    folder: str = "runs/demo"

    def __post_init__(self) -> None:
        spell_out(self, "--", "config", "folder")


def demo(command: Demo) -> None:
    """Runs `mora demo`."""
    from train.cli.demo import demo as run

    run(command.config, command.folder)
