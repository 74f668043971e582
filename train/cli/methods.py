"""`mora methods`: all methods side by side for one model."""

import math

from rich.table import Table

from mora_jax import trees
from mora_jax.methods import METHODS, Method
from mora_jax.models.llama import LlamaConfig, abstract_params
from train.config.sections import LINEARS
from train.console.terminal import console

Shape = tuple[int, ...]


def survey(model: LlamaConfig, rank: int) -> Table:
    """Returns a table of every method: trainable parameters, effect of a restart, and rank by kernel.

    Args:
      model: the model whose seven linears are adapted.
      rank: rank of LoRA, whose parameter count MoRA matches.
    """
    kernels = linears(model)
    distinct = sorted({shape[-2:] for shape in kernels.values()})
    table = Table(title=f"rank {rank}: r_hat / attainable rank of the update, by kernel")
    for name in ("method", "trainable", "restart"):
        table.add_column(name, no_wrap=True)
    for k, d in distinct:
        table.add_column(f"{k}x{d}", justify="right")
    table.add_row(
        "full", f"{sum(map(math.prod, kernels.values())):,}", "no", *(f"{min(s)}" for s in distinct)
    )
    for name, method in variants(rank).items():
        trainable = sum(method.count(*s[-2:]) * math.prod(s[:-2]) for s in kernels.values())
        ranks = (method.ranks(k, d) for k, d in distinct)
        table.add_row(name, f"{trainable:,}", method.restart_effect, *ranks)
    return table


def print_survey(model: LlamaConfig, rank: int) -> None:
    """Prints `survey`."""
    console().print(survey(model, rank))


def variants(rank: int) -> dict[str, Method]:
    """Returns the variants of every method, such as MoRA with each operator, by name."""
    return {name: method for cls in METHODS.values() for name, method in cls.variants(rank).items()}


def linears(model: LlamaConfig) -> dict[str, Shape]:
    """Returns the shapes of the kernels that are adapted by default, layers stacked, by path."""
    flat = trees.flatten(abstract_params(model))
    found = trees.first_match([(LINEARS, True), (trees.CATCH_ALL, False)], flat)
    return {path: flat[path].shape for path, is_linear in found.items() if is_linear}
