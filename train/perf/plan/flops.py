"""Floating-point operations of the matrix products of a traced program.

XLA's own count takes the body of a loop once, however often it runs; this one does not.
"""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr  # pyright: ignore[reportPrivateImportUsage] (jax 0.12)
from jax.interpreters import partial_eval


def product_flops(traced: ClosedJaxpr) -> int:
    """Multiplications and additions of all products whose results are used, over all devices."""
    used, _ = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
    return _count(used)


def _count(jaxpr: Jaxpr) -> int:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * equation.outvars[0].aval.size * math.prod(left[i] for i in contracted)
    if name == "pallas_call" and params["cost_estimate"]:
        return params["cost_estimate"].flops
    inner = [_count(jaxpr) for value in params.values() for jaxpr in _jaxprs(value)]
    if name == "cond":
        return max(inner)
    times = {"scan": "length", "shard_map": "mesh"}.get(name)
    repeats = params[times] if times == "length" else params[times].size if times else 1
    return sum(inner) * repeats


def _jaxprs(value: Any) -> Iterator[Jaxpr]:
    if isinstance(value, ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, Jaxpr):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _jaxprs(part)
