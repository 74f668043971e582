"""What people read of an assignment: how each parameter is seen, and how much of it is trained."""

import math
from collections.abc import Sequence

from mora_jax import trees
from mora_jax.on import Choice, On
from mora_jax.transform import Methods, Params


def describe(params: Params, methods: Methods) -> str:
    """Returns a table of every parameter: path, shape, how its method sees it, and numbers trained.

    Example:
      >>> import jax.numpy as jnp
      >>> from mora_jax import MoRA, On, assign, describe
      >>> params = {"query": jnp.ones((8, 2, 4)), "scale": jnp.ones(8)}
      >>> print(describe(params, assign([("query", On(MoRA(2), inputs=(0,))), (".*", "train")], params)))
      path   shape      seen as  method              trained
      query  (8, 2, 4)  (8, 8)   mora r 2, r_hat 5        25
      scale  (8,)                train                     8
      total                                         33 of 72
    """
    rows, trained, total = [("path", "shape", "seen as", "method", "trained")], 0, 0
    choices = dict(methods.choices)
    kernels = dict(methods.kernels())
    for path, leaf in trees.flatten(params).items():
        seen, what, count = "", str(choices[path]), count_trained(choices[path], leaf.shape)
        if on := kernels.get(path):
            axes = on.axes(leaf.shape)
            seen, what = axes.describe(), on.method.describe(axes.k, axes.d)
        rows.append((path, str(tuple(leaf.shape)), seen, what, f"{count:,}"))
        trained, total = trained + count, total + math.prod(leaf.shape)
    rows.append(("total", "", "", "", f"{trained:,} of {total:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([*map(str.ljust, row[:-1], widths), row[-1].rjust(widths[-1])]).rstrip() for row in rows
    )


def count_trained(choice: Choice, shape: Sequence[int]) -> int:
    """Returns how many numbers are trained for one parameter; padding of stored arrays does not count."""
    if isinstance(choice, str):
        return math.prod(shape) if choice == "train" else 0
    on = choice if isinstance(choice, On) else On(choice)
    axes = on.axes(shape)
    return math.prod(axes.sizes(axes.stack)) * on.method.count(axes.k, axes.d)
