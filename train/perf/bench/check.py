"""Compares every way to compute an adapted layer with its formula, before any of them is timed.

Legend of shapes in names: B tokens, K inputs, D outputs.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from mora_jax import sharding
from mora_jax.methods import Adapter, Method, Path, dense
from mora_jax.methods.base import padded
from mora_jax.methods.linear import TILE
from mora_jax.models.llama import LlamaConfig
from train.perf.bench.cases import DType

# Largest relative error by dtype of the products: |ours - formula| / |formula|, in the Euclidean norm.
LIMITS = {"bfloat16": 1e-2, "float32": 1e-5}
STD = 0.02  # of kernels and of adapters' arrays, which are not left as initialised: zeros would prove nothing


@dataclasses.dataclass(frozen=True)
class Finding:
    """The relative error of one quantity.

    Attributes:
      method: the method.
      layer: the kernels that share an input.
      path: the forced path.
      dtype: dtype of the products.
      what: output, input gradient or the gradient of an array.
      error: relative error.
    """

    method: str
    layer: str
    path: str
    dtype: str
    what: str
    error: float

    @property
    def passes(self) -> bool:
        """Whether the error is within its limit. NaN is not."""
        return self.error < LIMITS[self.dtype]

    def sentence(self) -> str:
        """Returns a message about an error that is too large."""
        return (
            f"{self.method} on {self.layer} by the {self.path} path in {self.dtype}: {self.what} is off by "
            f"{self.error:.1e} of the formula's (limit {LIMITS[self.dtype]:.0e})"
        )


def check(
    model: LlamaConfig, methods: Sequence[Method], tokens: int, base_dtype: DType = "float32"
) -> list[Finding]:
    """Compares all paths on all layer shapes of a model with float32 autodiff of the plain formula.

    The formula is `x @ method.weight(arrays, w)`.

    Args:
      model: the model whose layers are checked, with q/k/v and gate/up in one product, as it computes them.
      methods: the methods to check.
      tokens: tokens of the input.
      base_dtype: dtype of the kernels.
    """
    found = []
    for method in dict.fromkeys(methods):
        for layer, (k, widths) in layers(model).items():
            with jax.set_mesh(sharding.make_mesh(1)):  # as in a step; methods see the kind of the device
                errors = _errors(method, k, widths, tokens, base_dtype)
            for (path, dtype), by_quantity in errors.items():
                found += [
                    Finding(repr(method), layer, path, dtype, what, float(error))
                    for what, error in by_quantity.items()
                ]
    return found


def layers(model: LlamaConfig) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Returns the input width and the output widths of every product of a layer, by its kernels."""
    hidden, wide = model.hidden_size, model.intermediate_size
    return {
        "q/k/v": (hidden, (model.q_width, model.kv_width, model.kv_width)),
        "o": (model.q_width, (hidden,)),
        "gate/up": (hidden, (wide, wide)),
        "down": (wide, (hidden,)),
    }


def paths() -> Iterator[Any]:
    """Yields all paths that can be forced."""
    return (path for path in get_args(Path) if path != "auto")


def _errors(
    method: Method, k: int, widths: tuple[int, ...], tokens: int, base_dtype: DType
) -> dict[Any, Any]:
    """Returns relative errors by (path, dtype) and quantity for one layer."""
    keys = jax.random.split(jax.random.key(0), 4)
    # Exact in bfloat16, so that one formula serves products of both dtypes.
    x_BK = jax.random.normal(keys[0], (tokens, k), jnp.bfloat16)
    dys = [jax.random.normal(key, (tokens, d), jnp.bfloat16) for key, d in _each(keys[1], widths)]
    ws = [jax.random.normal(key, (k, d), base_dtype) * STD for key, d in _each(keys[2], widths)]
    arrays = [method.example(key, w, STD) for key, w in _each(keys[3], ws)]
    return jax.device_get(_compiled()(method, x_BK, dys, ws, arrays))


def _each(key: PRNGKeyArray, items: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(jax.random.split(key, len(items)), items, strict=True)


@functools.cache
def _compiled() -> Any:
    """Returns `_compare` compiled, on a GPU without autotuning, since each kernel runs once."""
    on_gpu = jax.devices()[0].platform == "gpu"
    return jax.jit(
        _compare, static_argnums=0, compiler_options={"xla_gpu_autotune_level": 0} if on_gpu else None
    )


def _compare(
    method: Method, x_BK: Array, dys: list[Array], ws: list[Array], arrays: list[Any]
) -> dict[Any, Any]:
    """Returns relative errors by (path, dtype) and quantity."""
    formula = functools.partial(_formula, method, ws)
    true = _value_and_gradients(method, formula, x_BK.astype(jnp.float32), arrays, dys)
    errors = {}
    for path in paths():
        for dtype in LIMITS:
            ours = functools.partial(_dense, method, ws, path)
            # By default float32 products are TensorFloat32 or made of bfloat16 ones.
            with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
                found = _value_and_gradients(method, ours, x_BK.astype(dtype), arrays, dys)
            errors[path, dtype] = {what: _distance(found[what], true[what]) for what in true}
    return errors


def _formula(method: Method, ws: list[Array], x_BK: Array, arrays: list[Any]) -> list[Array]:
    kernels = [method.weight(a, w.astype(jnp.float32)) for w, a in zip(ws, arrays, strict=True)]
    return [jnp.matmul(x_BK, w, precision=jax.lax.Precision.HIGHEST) for w in kernels]


def _dense(method: Method, ws: list[Array], path: Any, x_BK: Array, arrays: list[Any]) -> list[Array]:
    """Returns the outputs of `dense`, padded to complete tiles as the model pads its widths."""
    ys = dense(padded(x_BK, -1, TILE), ws, [Adapter(a, method) for a in arrays], path, tile=TILE)
    return [y[:, : w.shape[1]] for y, w in zip(ys, ws, strict=True)]


def _value_and_gradients(
    method: Method, function: Any, x_BK: Array, arrays: list[Any], dys: list[Array]
) -> dict[str, Any]:
    ys, vjp = jax.vjp(function, x_BK, arrays)
    dx_BK, darrays = vjp([dy.astype(y.dtype) for dy, y in zip(dys, ys, strict=True)])
    trained = [name for name, leaf in method.leaves().items() if leaf.trainable]
    gradients = {f"gradient of {name}": [d[name] for d in darrays] for name in trained}
    return {"output": ys, "input gradient": dx_BK, **gradients}


def _distance(ours: Any, true: Any) -> Array:
    """Returns the relative error over all outputs, or over the arrays of all kernels, together."""
    pairs = list(zip(jax.tree.leaves(ours), jax.tree.leaves(true), strict=True))
    off = sum(jnp.sum(jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32))) for a, b in pairs)
    return jnp.sqrt(off / sum(jnp.sum(jnp.square(b.astype(jnp.float32))) for _, b in pairs))
