"""`mora task ...`: the paper's tasks, beside `mora finetune` and `mora lm-eval`."""

import dataclasses
from typing import Annotated, Literal

import tyro

from mora_jax.errors import InputError
from train.cli.commands.arguments import Folder, Out, Runs
from train.config.paths import spell_out
from train.config.sections import at_least
from train.storage.files import check_free


@dataclasses.dataclass(frozen=True)
class UuidPairs:
    """Makes the pairs of UUIDs of the paper's memory task, as JSON lines of prompt and completion.

    A prompt is a key and a line break. Its completion is the value.

    Attributes:
      out: file to write.
      count: number of pairs.
      seed: seed of the random numbers.
      overwrite: replace the file if there is one; otherwise it is an error.
    """

    out: Out
    count: int = 10_000
    seed: int = 0
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False

    def __post_init__(self) -> None:
        spell_out(self, "", "out")
        at_least("--count", self.count, 1)


def uuid_pairs(command: UuidPairs) -> None:
    """Runs `mora task uuid-pairs`."""
    from train.tasks.uuids import make_pairs, write_pairs

    check_free(command.out, "OUT", command.overwrite)
    write_pairs(command.out, make_pairs(command.count, command.seed))
    print(f"written: {command.out} ({command.count:,} pairs)")


@dataclasses.dataclass(frozen=True)
class UuidScore:
    """Asks a run's checkpoints for the value of every key, and counts the hexadecimal digits that are right.

    The scores are printed, written to uuid_accuracy.json in the run's folder, and shown by TensorBoard.

    Attributes:
      run_dir: folder of the run.
      pairs: file of the pairs that it was trained on.
      steps: updates of the checkpoints, of those that the run has kept.
      batch_size: prompts that are computed at a time.
      dtype: type of products.
    """

    run_dir: Folder
    pairs: str
    steps: Annotated[tuple[int, ...], tyro.conf.arg(help_behavior_hint="(default: all)")] = ()
    batch_size: int = 2048
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def __post_init__(self) -> None:
        spell_out(self, "", "run_dir")
        spell_out(self, "--", "pairs")
        at_least("--batch-size", self.batch_size, 1)


def uuid_score(command: UuidScore) -> None:
    """Runs `mora task uuid-score`."""
    from rich.table import Table

    from train.console.terminal import console
    from train.tasks.uuids import read_pairs, score_run

    pairs = read_pairs(command.pairs)
    scores = score_run(command.run_dir, pairs, command.steps, command.batch_size, command.dtype)
    table = Table("updates", "character accuracy, %", "whole values, %", title=command.run_dir)
    for score in scores:
        table.add_row(f"{score.step:,}", f"{100 * score.character_accuracy:.1f}", f"{100 * score.exact:.1f}")
    console().print(table)


@dataclasses.dataclass(frozen=True)
class UuidPlot:
    """Draws the scores of mora task uuid-score over updates, and the training loss, of several runs.

    Attributes:
      runs: folders of runs.
      out: PNG file to write.
      overwrite: replace the file of --out if there is one; otherwise it is an error.
    """

    runs: Runs
    out: str
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False

    def __post_init__(self) -> None:
        spell_out(self, "", "runs")
        spell_out(self, "--", "out")
        if not self.runs:
            raise InputError("give the folders of runs: mora task uuid-plot RUN RUN --out FILE.png")


def uuid_plot(command: UuidPlot) -> None:
    """Runs `mora task uuid-plot`."""
    from train.tasks.uuid_plot import draw

    draw(command.runs, command.out, command.overwrite)
    print(f"written: {command.out}")


@dataclasses.dataclass(frozen=True)
class Reading:
    """Appends questions, which each document answers itself, to text: AdaptLLM's reading comprehension.

    The result is plain text for mora prepare-data. Documents in which no question is found stay as they are.

    Attributes:
      source: text: a file, a glob or a folder, in the formats of mora prepare-data.
      out: folder of JSON lines to write; a short first line of a document is its title.
      text_key: key of the text in a line of JSON, or its column in Parquet.
      questions: questions of a document, at most.
      seed: seed of the choice of questions and of their wording.
    """

    source: str
    out: str
    text_key: str = "text"
    questions: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        spell_out(self, "--", "source", "out")
        at_least("--questions", self.questions, 1)


def reading(command: Reading) -> None:
    """Runs `mora task reading`."""
    from train.tasks.reading import convert

    read, asked = convert(command.source, command.out, command.text_key, command.seed, command.questions)
    print(f"written: {command.out} ({read:,} documents, {asked:,} with questions)")
