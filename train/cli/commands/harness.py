"""`mora lm-eval`: the tasks of lm-evaluation-harness."""

import dataclasses
import importlib.util
from typing import TYPE_CHECKING, Literal

import tyro
from rich.table import Table

from mora_jax.errors import InputError
from train.cli.commands.arguments import Folder
from train.config.paths import spell_out
from train.console.terminal import console
from train.storage.files import check_free

if TYPE_CHECKING:
    from train.jobs.harness import TaskScore


@dataclasses.dataclass(frozen=True)
class LmEval:
    """Evaluates a run or a Hugging Face model on tasks of lm-evaluation-harness (extra `eval`).

    Task files are programs: a `!function` in one, of the harness or of --include-path, executes Python. Read
    those that you were given.

    Attributes:
      path: folder of a run, Hugging Face folder, or id of a model on the Hub (org/name, org/name@revision).
      tasks: names of tasks, groups or tags, with commas between them: mmlu,gsm8k.
      include_path: folder of task files (YAML) of your own, which win over the harness's; empty for none.
      num_fewshot: examples in each prompt; -1 for what each task says. A task that says 0 keeps it.
      limit: most documents of each task; 0 for all.
      chat: write prompts in the tokenizer's chat template, examples as turns of the conversation.
      batch_size: requests that are computed at a time.
      merged: merge a run's adapters; with --no-merged they are computed beside the kernels.
      dtype: type of products.
      out: file of JSON to write the scores to; empty for none. Those of a run are always kept in its folder
        lm_eval, and shown by TensorBoard and, if the run logs there, by Weights & Biases.
      overwrite: replace the file of --out if there is one; otherwise it is an error.
    """

    path: Folder
    tasks: str
    include_path: str = ""
    num_fewshot: int = -1
    limit: int = 0
    chat: tyro.conf.FlagCreatePairsOff[bool] = False
    batch_size: int = 8
    merged: bool = True
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    out: str = ""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False

    def __post_init__(self) -> None:
        spell_out(self, "", "path")
        spell_out(self, "--", optional=("include_path", "out"))
        if not all(self.names()):
            raise InputError("--tasks must be names with commas between them, such as mmlu,gsm8k")
        for name, least in (("num_fewshot", -1), ("limit", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                flag = f"--{name.replace('_', '-')}"
                raise InputError(f"{flag} must be at least {least}, not {getattr(self, name)}")

    def names(self) -> tuple[str, ...]:
        """Returns the names of the tasks."""
        return tuple(name.strip() for name in self.tasks.split(","))


def lm_eval(command: LmEval) -> None:
    """Runs `mora lm-eval`."""
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("mora lm-eval needs lm-evaluation-harness: pip install 'mora_jax[eval]'")
    check_free(command.out, "--out", command.overwrite)

    from train.jobs.generate import load_generator
    from train.jobs.harness import Asked, harness_seeds, keep_scores, load_tasks, run_tasks

    shots = None if command.num_fewshot < 0 else command.num_fewshot
    asked = Asked(command.names(), command.include_path, shots, command.limit, command.chat)
    with harness_seeds():
        tasks = load_tasks(asked)
        generator = load_generator(command.path, command.merged, command.dtype, command.batch_size)
        scores = run_tasks(generator, tasks, asked, command.batch_size)
    _print_table(scores)
    keep_scores(command.path, generator.step, asked, scores, command.out)


def _print_table(scores: "list[TaskScore]") -> None:
    table = Table("task", "shots", "documents", "metric", "value", "stderr", box=None)
    for each in scores:
        numbers = ("" if n is None else f"{n:,}" for n in (each.num_fewshot, each.documents))
        stderr = "" if each.stderr is None else f"{each.stderr:.4f}"
        table.add_row(each.task, *numbers, each.metric, f"{each.value:.4f}", stderr)
    console().print(table)
