"""`mora pretrain CONFIG --dry-run`: what a config amounts to, without computing anything."""

import math
from typing import Any

import jax
from rich.table import Column, Table

from mora_jax import trees
from mora_jax.errors import InputError
from mora_jax.on import Choice, method_of
from mora_jax.report import count_trained
from mora_jax.transform import Methods
from train.config.run import RunConfig
from train.console.terminal import console
from train.data.rows.info import check_trainable, load_info
from train.jobs.pretrain import check_rows
from train.run.state import assign_methods, state_shapes


def describe(config: RunConfig) -> tuple[Table, Table]:
    """Tables of every parameter (shape, what is done with it, trained entries) and of the whole run.

    Raises:
      InputError: for rules that do not fit the model, or a config that does not fit its data set.
    """
    methods = assign_methods(config)
    state = state_shapes(config, methods)
    return _parameters(state.params, methods), _run(config, methods, state)


def print_description(config: RunConfig) -> None:
    """Prints `describe`. Raises InputError if epochs are asked for, and there are no rows to count."""
    if config.epochs:
        check_trainable(info := load_info(config.data.directory, splits=()))
        config = config.in_steps(info.rows["train"])
    console().print(*describe(config))


def _parameters(params: Any, methods: Methods) -> Table:
    path_column = Column("parameter", overflow="fold")  # a narrow terminal must not cut names off
    table = Table(path_column, "shape", "treatment", "trained", title="parameters", title_justify="left")
    for path, leaf in trees.flatten(params).items():
        trained = count_trained(methods[path], leaf.shape)
        table.add_row(
            path, "x".join(map(str, leaf.shape)), _treatment(methods[path], leaf.shape), f"{trained:,}"
        )
    return table


def _run(config: RunConfig, methods: Methods, state: Any) -> Table:
    flat = trees.flatten(state.params)
    trained = sum(count_trained(methods[path], leaf.shape) for path, leaf in flat.items())
    frozen = sum(math.prod(leaf.shape) for path, leaf in flat.items() if methods[path] != "train")
    table = Table("", "", title="run", title_justify="left", show_header=False)
    for name, value in {
        "model": f"{_size(state.params):,} parameters",
        "trainable": f"{trained:,} parameters",
        "frozen": f"{frozen:,} parameters",
        "optimizer state": f"{_bytes(state.opt_state) / 2**20:,.1f} MiB",
        "a step": f"{config.tokens_per_step():,} tokens",
        "the run": f"{config.steps:,} steps, {config.tokens_per_step() * config.steps:,} tokens",
        "training rows": _rows(config),
        "restarts": f"{config.restarts_before(config.steps):,}",
    }.items():
        table.add_row(name, value)
    return table


def _rows(config: RunConfig) -> str:
    try:
        check_trainable(info := load_info(config.data.directory, splits=()))
    except (InputError, OSError) as error:
        return f"unknown: {error}"
    check_rows(config, info)
    rows = info.rows["train"]
    return f"{rows:,}, read {config.repeats(rows):.2f} times (epochs)"


def _treatment(choice: Choice, shape: tuple[int, ...]) -> str:
    method = method_of(choice)
    return method.describe(*shape[-2:]) if method else str(choice)


def _size(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
