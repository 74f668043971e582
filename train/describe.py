"""What a config amounts to, before anything is paid for it: `mora pretrain CONFIG --dry-run`."""

import math
from typing import Any

import jax
from rich.console import Console, Group
from rich.table import Table

from mora_jax import transform, trees
from mora_jax.methods import MoRA
from mora_jax.transform import Methods
from train import runs
from train.config import RunConfig
from train.step import init_params, init_state


def describe(config: RunConfig) -> Group:
    """Tables of every array (shape, treatment, trained and frozen sizes) and of the run's length.

    Raises:
      InputError: for rules that do not fit the model.
    """
    methods = runs.assign_methods(config)
    state = jax.eval_shape(lambda: init_state(config, methods, init_params(config)))
    trainable, frozen = transform.partition(state.params, state.adapters, methods)
    totals = Table("", "", title="run", show_header=False)
    for name, value in {
        "trainable parameters": f"{size(trainable):,}",
        "frozen parameters": f"{size(frozen):,}",
        "optimizer state": f"{size(state.opt_state) * 4 / 2**20:,.1f} MiB",
        "tokens a step": f"{config.tokens_per_step():,}",
        "steps": f"{config.steps:,}",
        "tokens in all": f"{config.tokens_per_step() * config.steps:,}",
        "restarts": f"{config.restarts_before(config.steps):,}",
    }.items():
        totals.add_row(name, value)
    return Group(_arrays(state.params, state.adapters, methods), totals)


def print_description(config: RunConfig) -> None:
    """Prints `describe`."""
    Console().print(describe(config))


def size(tree: Any) -> int:
    """The number of entries of all arrays in a tree."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _arrays(params: Any, adapters: Any, methods: Methods) -> Table:
    table = Table("parameter", "shape", "treatment", "trained", title="parameters")
    flat_adapters = trees.flatten(adapters)
    for path, leaf in trees.flatten(params).items():
        choice = methods[path]
        if isinstance(choice, str):
            trained = math.prod(leaf.shape) if choice == "train" else 0
            table.add_row(path, str(leaf.shape), choice, f"{trained:,}")
            continue
        arrays = {n: a for n, a in flat_adapters.items() if n.startswith(f"{path}/")}
        trained = sum(math.prod(arrays[f"{path}/{n}"].shape) for n, leaf_ in choice.leaves().items() if leaf_.trainable)
        table.add_row(path, str(leaf.shape), _treatment(choice, leaf.shape), f"{trained:,}")
    return table


def _treatment(method: Any, shape: tuple[int, ...]) -> str:
    if isinstance(method, MoRA):
        return f"mora r={method.rank} r_hat={method.r_hat(*shape[-2:])} {method.operator}"
    return f"{method.name} r={method.rank}"
