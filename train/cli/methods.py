"""All methods side by side for one model, to choose from: `mora methods`."""

import math

from rich.table import Table

from mora_jax import trees
from mora_jax.methods import METHODS, Method
from mora_jax.models.llama import LlamaConfig, abstract_params
from train.config.sections import LINEARS
from train.console.terminal import console

Shape = tuple[int, ...]


def survey(model: LlamaConfig, rank: int) -> Table:
    """A row a method, MoRA with each operator: trainable parameters, r_hat and attainable rank a kernel.

    Args:
      model: its seven linears are adapted.
      rank: LoRA's rank, and the one that MoRA matches in parameters.
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
        table.add_row(name, f"{trainable:,}", restarts(method), *(_ranks(method, *s) for s in distinct))
    return table


def print_survey(model: LlamaConfig, rank: int) -> None:
    """Prints `survey`."""
    console().print(survey(model, rank))


def variants(rank: int) -> dict[str, Method]:
    """Every method, and MoRA once with every operator."""
    return {name: method for cls in METHODS.values() for name, method in cls.variants(rank).items()}


def linears(model: LlamaConfig) -> dict[str, Shape]:
    """The shapes of the kernels that are adapted by default, layers stacked, by path."""
    flat = trees.flatten(abstract_params(model))
    found = trees.first_match([(LINEARS, True), (trees.CATCH_ALL, False)], flat)
    return {path: flat[path].shape for path, is_linear in found.items() if is_linear}


def restarts(method: Method) -> str:
    """What a restart does: the pattern is switched or stays the same, random factors are drawn anew."""
    return method.restart_effect


def _ranks(method: Method, k: int, d: int) -> str:
    return method.ranks(k, d)
