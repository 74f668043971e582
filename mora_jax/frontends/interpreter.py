"""An interpreter of jaxprs in which some inputs are kernels with adapters.

A kernel stays symbolic while the program casts, transposes, reshapes or slices it, and while it enters jit,
`checkpoint` or a scan. A product that contracts its inputs becomes `dense`. Every other use takes the
effective kernel, so the result is that of the merged parameters whatever the program does.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from mora_jax.frontends.kernel import Kernel
from mora_jax.methods import linear

Values = list[Any]


def evaluate(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> Values:
    """Returns the outputs of a jaxpr, some of whose inputs may be `Kernel`s."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*map(_array, consts), *args], strict=True))

    def read(atom: Any) -> Any:
        return _array(atom.val) if isinstance(atom, Literal) else values[atom]

    for eqn in jaxpr.eqns:
        found = [read(atom) for atom in eqn.invars]
        scope = str(eqn.source_info.name_stack)
        with eqn.ctx.manager, jax.named_scope(scope) if scope else contextlib.nullcontext():
            outputs = _applied(eqn, found)
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _array(constant: Any) -> Any:
    """Returns a constant as an array of JAX: functions that are kept in a program may index it by tracers."""
    return jnp.asarray(constant) if isinstance(constant, np.ndarray) else constant


def materialised(value: Any, reader: str) -> Any:
    """Returns a value, or the effective kernel of a `Kernel`."""
    return value.effective(reader) if isinstance(value, Kernel) else value


def _applied(eqn: JaxprEqn, args: Values) -> Values:
    rule = RULES.get(eqn.primitive.name)
    if rule and any(isinstance(arg, Kernel) for arg in args):
        outputs = rule(eqn, args)
        if outputs is not None:
            return outputs
    args = [materialised(arg, eqn.primitive.name) for arg in args]
    outputs = eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(eqn.params))
    return outputs if eqn.primitive.multiple_results else [outputs]


# Rules take an equation and its inputs. They return its outputs, or None to take the effective kernels.


def _cast(eqn: JaxprEqn, args: Values) -> Values | None:
    return _one(args[0].cast(eqn.params["new_dtype"]))


def _transpose(eqn: JaxprEqn, args: Values) -> Values | None:
    return _one(args[0].transposed(eqn.params["permutation"]))


def _reshape(eqn: JaxprEqn, args: Values) -> Values | None:
    return _one(args[0].reshaped(eqn.params["new_sizes"]))


def _squeeze(eqn: JaxprEqn, args: Values) -> Values | None:
    dropped = eqn.params["dimensions"]
    kept = [width for axis, width in enumerate(args[0].shape) if axis not in dropped]
    return _one(args[0].reshaped(kept))


def _broadcast(eqn: JaxprEqn, args: Values) -> Values | None:
    shape, kernel = eqn.params["shape"], args[0]
    kept = eqn.params["broadcast_dimensions"]
    new = [width for axis, width in enumerate(shape) if axis not in kept]
    widths = tuple(shape[axis] for axis in kept)
    return _one(kernel.reshaped(shape)) if widths == kernel.shape and set(new) <= {1} else None


def _slice(eqn: JaxprEqn, args: Values) -> Values | None:
    starts, limits, strides = (eqn.params[name] for name in ("start_indices", "limit_indices", "strides"))
    cut = _cut(args[0].shape, [end - start for start, end in zip(starts, limits, strict=True)])
    if cut is None or (strides and set(strides) != {1}):
        return None
    return _one(args[0].sliced(cut, starts[cut], limits[cut] - starts[cut]))


def _dynamic_slice(eqn: JaxprEqn, args: Values) -> Values | None:
    kernel, *starts = args
    widths = eqn.params["slice_sizes"]
    cut = _cut(kernel.shape, widths)
    if cut is None:
        return None
    return _one(kernel.sliced(cut, starts[cut], widths[cut]))


def _dot_general(eqn: JaxprEqn, args: Values) -> Values | None:
    x_first = not isinstance(args[0], Kernel)
    x, kernel = args if x_first else reversed(args)
    if isinstance(x, Kernel) or not _is_plain_product(eqn, x, kernel):
        return None
    (contract, batch) = eqn.params["dimension_numbers"]
    if not x_first:
        contract, batch = contract[::-1], batch[::-1]
    product = kernel.product(x, contract, batch)
    return None if product is None else [product.arranged(kernel, contract[1], batch[1], x_first)]


def _jit(eqn: JaxprEqn, args: Values) -> Values:
    closed = eqn.params["jaxpr"]
    return evaluate(closed.jaxpr, closed.consts, args)


def _checkpoint(eqn: JaxprEqn, args: Values) -> Values:
    params = eqn.params
    policy = _saving_products(params["policy"]) if params["policy"] else None

    def function(*args: Any) -> Values:
        outputs = evaluate(params["jaxpr"], (), args)
        return [materialised(output, "an output of jax.checkpoint") for output in outputs]

    return jax.checkpoint(function, prevent_cse=params["prevent_cse"], policy=policy)(*args)


def _scan(eqn: JaxprEqn, args: Values) -> Values:
    params, closed = eqn.params, eqn.params["jaxpr"]
    consts, carry, xs = _scanned(params, args)
    carry = [materialised(value, "a scan's carry") for value in carry]
    slices = [(x.slices() or x.effective("a scan")) if isinstance(x, Kernel) else x for x in xs]

    def body(carry: Values, inputs: tuple[Any, Values]) -> tuple[Values, Values]:
        i, xs = inputs
        own = [v.keyed(i) if isinstance(v, Kernel) else v for v in consts]
        outputs = evaluate(closed.jaxpr, closed.consts, [*own, *carry, *xs])
        outputs = [materialised(output, "a scan's output") for output in outputs]
        return outputs[: len(carry)], outputs[len(carry) :]

    carry, ys = jax.lax.scan(
        body,
        carry,
        (jnp.arange(params["length"]), slices),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *ys]


def _scanned(params: Mapping[str, Any], args: Values) -> tuple[Values, Values, Values]:
    """Returns the constants, the carry and the scanned inputs of a scan."""
    if "ft_in" in params:  # JAX 0.12
        consts, carry, xs = params["ft_in"].update(args).unpack()
        return list(consts), list(carry), list(xs)
    constant, carried = params["num_consts"], params["num_carry"]
    return args[:constant], args[constant : constant + carried], args[constant + carried :]


RULES: dict[str, Callable[[JaxprEqn, Values], Values | None]] = {
    "convert_element_type": _cast,
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "dot_general": _dot_general,
    "jit": _jit,
    "remat2": _checkpoint,
    "scan": _scan,
}


def _one(kernel: Kernel | None) -> Values | None:
    return None if kernel is None else [kernel]


def _cut(whole: Sequence[int], part: Sequence[int]) -> int | None:
    """Returns the only axis along which a slice is smaller; None if there are several or none."""
    cut = [axis for axis, (old, new) in enumerate(zip(whole, part, strict=True)) if old != new]
    return cut[0] if len(cut) == 1 else None


def _is_plain_product(eqn: JaxprEqn, x: Any, kernel: Kernel) -> bool:
    """Returns whether `dense` computes in the types and the precision that the product asks for."""
    params = eqn.params
    return (
        x.dtype == kernel.dtype
        and jnp.finfo(x.dtype).bits >= 16  # methods are not made for narrower types
        and params["preferred_element_type"] in (None, x.dtype)
        and params.get("out_sharding") is None
        and not any(jax.typeof(a).sharding.mesh.explicit_axes for a in (x, kernel.w))
        and _precision(params["precision"]) == _precision(jax.config.jax_default_matmul_precision)  # pyright: ignore[reportAttributeAccessIssue]
    )


def _precision(given: Any) -> Any:
    """Returns a precision in one form: an algorithm, or a pair of `lax.Precision`."""
    if isinstance(given, str):
        try:
            given = jax.lax.Precision(given)
        except ValueError:
            return given
    if given is None or isinstance(given, jax.lax.Precision):
        given = (given or jax.lax.Precision.DEFAULT,) * 2
    return given


def _saving_products(policy: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a policy of `jax.checkpoint` that sees the product inside `dense` as the product it was."""
    dimensions = (((1,), (0,)), ((), ()))

    def decide(primitive: Any, *avals: Any, **params: Any) -> Any:
        if primitive.name != "custom_vjp_call" or not _is_dense(params["call_jaxpr"].jaxpr):
            return policy(primitive, *avals, **params)
        product = {"dimension_numbers": dimensions, "precision": None, "preferred_element_type": None}
        return policy(jax.lax.dot_general_p, *avals[:2], **product)

    return decide


def _is_dense(jaxpr: Jaxpr) -> bool:
    return jaxpr.debug_info.func_filename == linear.__file__
