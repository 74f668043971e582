"""`mora checkpoints` and `mora plot`."""

import dataclasses
from typing import Annotated

import tyro

from mora_jax.errors import InputError
from train.cli.commands.arguments import Folder
from train.config.paths import spell_out
from train.console import exits


@dataclasses.dataclass(frozen=True)
class ListCheckpoints:
    """Lists and verifies a run's checkpoints. Exits with status 4 if one is damaged.

    Attributes:
      run_dir: folder of the run, which may be training.
      no_verify: only list the checkpoints; verifying reads every file.
    """

    run_dir: Folder
    no_verify: tyro.conf.FlagCreatePairsOff[bool] = False

    def __post_init__(self) -> None:
        spell_out(self, "", "run_dir")


def list_checkpoints(command: ListCheckpoints) -> None:
    """Runs `mora checkpoints`."""
    import jax

    from train.run.inventory import print_inventory

    jax.config.update("jax_platforms", "cpu")  # the run may be using the GPU
    if not print_inventory(command.run_dir, not command.no_verify):
        raise SystemExit(exits.DAMAGED)


@dataclasses.dataclass(frozen=True)
class Plot:
    """Draws the loss and the learning rate of one run, or of several in one picture.

    Attributes:
      runs: folders of runs, which may be training.
      out: PNG file to write; by default loss.png in the folder of a single run.
      overwrite: replace the file of --out if there is one; otherwise it is an error.
    """

    runs: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="(required)"),
    ]
    out: str = ""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False

    def __post_init__(self) -> None:
        spell_out(self, "", "runs")
        spell_out(self, "--", optional=("out",))
        if len(self.runs) != 1 and not self.out:
            raise InputError("give one run, or a PNG file for several: mora plot RUN RUN --out FILE.png")


def plot(command: Plot) -> None:
    """Runs `mora plot`."""
    from train.jobs.plot import draw_runs

    print(f"written: {draw_runs(command.runs, command.out, command.overwrite)}")
