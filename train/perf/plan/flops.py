"""Counts the floating-point operations of the matrix products of a traced program.

XLA's own count takes the body of a loop once, however often it runs. This one multiplies by the runs.
"""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr  # pyright: ignore[reportPrivateImportUsage] (jax 0.12)
from jax.interpreters import partial_eval


def product_flops(traced: ClosedJaxpr) -> int:
    """Returns the multiplications and additions, over all devices, of the products whose results are used."""
    used, _ = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
    return _of_jaxpr(used)


def _of_jaxpr(jaxpr: Jaxpr) -> int:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * equation.outvars[0].aval.size * math.prod(left[i] for i in contracted)
    if name == "pallas_call" and params["cost_estimate"]:
        return params["cost_estimate"].flops
    inner = [_of_jaxpr(jaxpr) for value in params.values() for jaxpr in _jaxprs(value)]
    if name == "cond":
        return max(inner)
    if name == "scan":
        return sum(inner) * params["length"]
    if name == "pallas_call":
        return sum(inner) * math.prod(params["grid_mapping"].grid)
    if name == "shard_map":
        return sum(inner) * params["mesh"].size
    return sum(inner)


def _jaxprs(value: Any) -> Iterator[Jaxpr]:
    if isinstance(value, ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, Jaxpr):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _jaxprs(part)
