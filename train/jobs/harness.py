"""lm-evaluation-harness in process: its tasks, loaded by name, run on a model of ours; the scores kept.

The harness's own `simple_evaluate` seeds Python's random numbers for good and runs git. `evaluate` does not.
"""

import contextlib
import dataclasses
import logging
import os
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from lm_eval.evaluator import evaluate  # pyright: ignore[reportMissingImports]
from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
from lm_eval.tasks._yaml_loader import load_yaml  # pyright: ignore[reportMissingImports]

from mora_jax.errors import InputError, nearest, reason, some
from mora_jax.io import json_text
from train.console.terminal import log, warn
from train.jobs.generate import Generator
from train.jobs.harness_model import HarnessModel
from train.run.folder import CONFIG, read_config
from train.run.metrics import add_scores
from train.storage.files import make_folder, naming_errors, write_whole

FOLDER = "lm_eval"  # of a run, for its scores
# Draws for the standard error of a metric that has no formula. The harness's own 100,000 take minutes.
_DRAWS = 1_000
# The seeds of the harness: tasks that shuffle choices then agree with its own program.
_SEED, _NUMPY_SEED, _EXAMPLES_SEED = 0, 1234, 1234


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is evaluated.

    Attributes:
      tasks: names of tasks, groups or tags.
      include_path: folder of task files, which win over the harness's own; empty for none.
      num_fewshot: examples in each prompt; None for what each task says.
      limit: most documents of each task; 0 for all.
      chat: whether prompts are conversations in the tokenizer's chat template, examples as turns.
    """

    tasks: tuple[str, ...]
    include_path: str = ""
    num_fewshot: int | None = None
    limit: int = 0
    chat: bool = False


@dataclasses.dataclass(frozen=True)
class TaskScore:
    """One metric of a task or of a group.

    Attributes:
      task: its name.
      metric: the metric, and the filter of answers behind a comma unless that is "none".
      value: the score.
      stderr: its standard error; None if the harness has none.
      higher_is_better: None if the task does not say.
      num_fewshot: examples in each prompt; None for a group of several.
      documents: those that were evaluated; None for a group.
      version: of the task.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool | None
    num_fewshot: int | None
    documents: int | None
    version: float | str | None


def load_tasks(asked: Asked) -> Any:
    """Returns the harness's tasks and groups of some names, with their data sets.

    Task files are programs: a `!function` in one runs Python.

    Raises:
      InputError: for an unknown name, or a task whose file or data set cannot be read.
    """
    if asked.include_path and not Path(asked.include_path).is_dir():
        raise InputError(f"--include-path {asked.include_path} is no folder")
    manager = TaskManager(include_path=asked.include_path or None, include_defaults=False)
    if set(asked.tasks) - set(manager.all_tasks):  # reading the harness's own files takes seconds
        manager = TaskManager(include_path=asked.include_path or None)
    for name in asked.tasks:
        if name not in manager.all_tasks:
            hint = _unreadable(asked.include_path) or nearest(name, manager.all_tasks)
            raise InputError(f"there is no task {name!r}{hint}")
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in dict.fromkeys(asked.tasks):
        try:
            with _without_retries():
                found = manager.load([name])
        except Exception as error:  # a task is a program
            raise InputError(f"task {name} cannot be loaded, or its data set: {reason(error)}") from error
        for kind, items in loaded.items():
            items |= found.get(kind, {})
    for name, task in loaded["tasks"].items():
        _set_examples(task, asked.num_fewshot)
        _check_examples(name, task)
    return loaded


def run_tasks(generator: Generator, tasks: Any, asked: Asked, batch_size: int) -> list[TaskScore]:
    """Returns the scores of a model.

    Args:
      generator: the model.
      tasks: what `load_tasks` returned.
      asked: what is evaluated.
      batch_size: requests that are computed at a time.

    Raises:
      InputError: if a task needs what the model cannot do, or the tokenizer has no chat template.
    """
    if asked.chat:
        _ = generator.codec.chat_template  # before anything is computed
    for name, task in tasks["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise InputError(f"task {name} executes what a model writes, or shows pictures; run it elsewhere")
    model = HarnessModel(generator, batch_size)
    with contextlib.redirect_stdout(sys.stderr):
        results: Any = evaluate(
            model,
            tasks,
            limit=asked.limit or None,
            bootstrap_iters=_DRAWS,
            log_samples=False,
            apply_chat_template=asked.chat,
            fewshot_as_multiturn=asked.chat,
        )
    if model.cut:
        warn(
            [
                f"{model.cut:,} of {model.asked:,} requests are longer than the model's context of "
                f"{model.max_length:,} tokens; they were cut from the left"
            ]
        )
    return _scores(results)


@contextlib.contextmanager
def harness_seeds() -> Iterator[None]:
    """Seeds the random numbers of Python and numpy as the harness does, and restores them after the block.

    Nothing is forked meanwhile: JAX has threads.
    """
    state, numpy_state, forks = random.getstate(), np.random.get_state(), os.environ.get("DISABLE_MULTIPROC")
    random.seed(_SEED)
    np.random.seed(_NUMPY_SEED)
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)
        os.environ.pop("DISABLE_MULTIPROC")
        os.environ |= {} if forks is None else {"DISABLE_MULTIPROC": forks}


def keep_scores(
    path: str, step: int | None, asked: Asked, scores: Sequence[TaskScore], out: str = ""
) -> None:
    """Writes scores: to a file, and for a run to its folder, TensorBoard and Weights & Biases.

    Args:
      path: the model, as it was given.
      step: updates of the run's checkpoint; None if the model is no run.
      asked: what was evaluated.
      scores: the scores.
      out: file to write; empty for none.
    """
    report = {
        "model": path,
        "step": step,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "lm_eval": version("lm_eval"),
        "limit": asked.limit or None,
        "chat": asked.chat,
        "scores": [dataclasses.asdict(score) for score in scores],
    }
    files = [epath.Path(out)] if out else []
    if step is not None:
        folder = epath.Path(path) / FOLDER
        make_folder(folder)
        files.append(folder / f"{step:06d}-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}.json")
    for file in files:
        with naming_errors(file):
            write_whole(file, json_text(report, indent=1) + "\n")
        log(f"scores are in {file}")
    if step is not None and (epath.Path(path) / CONFIG).exists():
        values = {f"lm_eval/{score.task}/{score.metric}": score.value for score in scores}
        add_scores(path, [(max(step - 1, 0), values)], read_config(path).log.wandb)


@contextlib.contextmanager
def _without_retries() -> Iterator[None]:
    """Lets the library of the Hub say nothing of its retries; the error behind them says enough."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _set_examples(task: Any, num_fewshot: int | None) -> None:
    """Sets the number of examples in a task's prompts, unless the task says that it takes none."""
    own = task.get_config("num_fewshot")
    if num_fewshot is not None and own != 0:
        task.set_config("num_fewshot", num_fewshot)
    elif own is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(_EXAMPLES_SEED)


def _check_examples(name: str, task: Any) -> None:
    """Raises InputError if a task has too few examples for its prompts, besides the one that is asked."""
    count = task.get_config("num_fewshot")
    there = list(task.fewshot_docs()) if count else []
    left = len(there) - (len(there) == count and there == list(task.eval_docs))
    if count and left < count:
        raise InputError(f"task {name} has {left} examples, too few for prompts with {count} (--num-fewshot)")


def _unreadable(folder: str) -> str:
    """Returns what to say of task files that cannot be read, which the harness skips without a word."""
    bad = []
    for file in sorted(Path(folder).glob("**/*.yaml")) if folder else ():
        try:
            load_yaml(file, resolve_func=False)
        except Exception as error:  # of YAML, or of the harness
            bad.append(f"{file} ({reason(error)})")
    return f"; these files cannot be read: {some(bad)}" if bad else ""


def _scores(results: Mapping[str, Any]) -> list[TaskScore]:
    """Returns the scores in the harness's results, where a key is a metric and a filter: `acc,none`."""
    found = []
    for task, values in results["results"].items():
        for key, value in values.items():
            name, comma, kind = key.partition(",")
            if not comma or name.endswith("_stderr"):
                continue
            stderr = values.get(f"{name}_stderr,{kind}")
            found.append(
                TaskScore(
                    task,
                    name if kind == "none" else key,
                    float(value),
                    float(stderr) if isinstance(stderr, int | float) else None,
                    results["higher_is_better"].get(task, {}).get(name),
                    results["n-shot"].get(task),
                    results["n-samples"].get(task, {}).get("effective"),
                    results["versions"].get(task),
                )
            )
    return found
