"""`mora checkpoints`, `mora plot` and `mora spectrum`."""

import dataclasses

import tyro

from mora_jax.errors import InputError
from train.cli.commands.arguments import Folder, Runs
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

    runs: Runs
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


@dataclasses.dataclass(frozen=True)
class ShowSpectrum:
    """Prints the singular values of what a run changed: the rank that its method used.

    The updates are those of the newest good checkpoint since the start, adapters merged, over all restarts.

    Attributes:
      path: folder of a run, Hugging Face folder, or id of a model on the Hub.
      before: what it is compared with, likewise; by default what the run started from.
      out: JSON file for all singular values; empty for none.
      picture: PNG file for the counts above 0.1 over the layers; empty for none.
      overwrite: replace files that are there; otherwise they are an error.
    """

    path: Folder
    before: str = ""
    out: str = ""
    picture: str = ""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False

    def __post_init__(self) -> None:
        spell_out(self, "", "path")
        spell_out(self, "--", optional=("before", "out", "picture"))


def show_spectrum(command: ShowSpectrum) -> None:
    """Runs `mora spectrum`."""
    from rich.table import Table

    from train.console.terminal import console
    from train.jobs.spectrum import ABOVE, by_kernel, spectra, write_spectra
    from train.storage.files import check_free

    check_free(command.out, "--out", command.overwrite)
    check_free(command.picture, "--picture", command.overwrite, ".png")
    found = spectra(command.path, command.before)
    heads = ("kernel", "layers", "largest", f"above {ABOVE}, mean", "rank, mean", "at most")
    table = Table(*heads, title="singular values of the update")
    for kernel, layers in by_kernel(found):
        above = sum(each.above for each in layers) / len(layers)
        rank = sum(each.rank for each in layers) / len(layers)
        largest, most = max(s.values_R[0] for s in layers), len(layers[0].values_R)
        table.add_row(kernel, f"{len(layers)}", f"{largest:.3g}", f"{above:.1f}", f"{rank:.1f}", f"{most}")
    console().print(table)
    write_spectra(found, command.out, command.picture)
