"""`dense` on a mesh: the numbers of one device, and what is all-gathered for them."""

import dataclasses
import functools
import math
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from method_cases import PATHS
from slow import quick, slow

from mora_jax import sharding
from mora_jax.methods import (
    Adapter,
    DoRA,
    LoRA,
    Method,
    MoRA,
    Rotate,
    Share,
    Spectral,
    Truncate,
    dense,
    mora,
)
from mora_jax.methods.base import Leaf, outer_by_parts, padded
from mora_jax.sharding import COLUMNS, ROWS, Layout
from train.perf.plan.hlo import collectives

B, T, K, D = 8, 64, 64, 96
METHODS = {"strided": MoRA(8, Share(0), align=8), "contiguous": MoRA(8, Share(1), align=8)}


def inputs(method: MoRA) -> tuple[jax.Array, jax.Array, Any]:
    x, w = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(((B, T, K), (K, D))))
    return x, 0.1 * w, method.example(jax.random.key(2), w, 0.1)


def gradients(method: MoRA, layout: Layout, keep: bool, places: Any = None) -> Any:
    """Returns the compiled gradients of a loss for x, the kernel and the adapter."""

    def loss(x: jax.Array, w: jax.Array, arrays: Any) -> jax.Array:
        (y,) = dense(x, [w], [Adapter(arrays, method)], "merged", layouts=[layout], keep=keep)
        y = sharding.constrain(y, Layout((P(sharding.BATCH, None, None),)))
        return jnp.sum(jnp.sin(y))

    step = jax.jit(jax.grad(loss, argnums=(0, 2)), in_shardings=places)
    return step.lower(*(jax.eval_shape(lambda: inputs(method)) if places else inputs(method))).compile()


def gathered(program: Any, mesh: Any) -> Counter[str]:
    """Returns the number of all-gathers by axis, and under "bytes" their complete size."""
    found: Counter[str] = Counter()
    for collective in collectives(program.as_text(), mesh.shape):
        if collective.kind == "all-gather":
            found[collective.axes] += collective.times
            found["bytes"] += collective.bytes
    return found


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("layout", [COLUMNS, slow(ROWS)], ids=["columns", "rows"])
@pytest.mark.parametrize("sizes", [slow((1, 4, 1)), slow((1, 1, 4)), slow((2, 1, 2)), (2, 2, 2)], ids=str)
def test_the_gradients_are_those_of_one_device(name: str, layout: Layout, sizes: tuple[int, int, int]):
    method = METHODS[name]
    expected = gradients(method, layout, False)(*inputs(method))
    with jax.set_mesh(sharding.make_mesh(*sizes)):
        for keep in (False, True):
            got = gradients(method, layout, keep)(*inputs(method))
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), got, expected)


@pytest.mark.parametrize("path", quick(["merged"], PATHS))
def test_an_input_without_a_batch(path: Any):
    method = METHODS["strided"]
    x, w, arrays = inputs(method)

    @jax.jit
    def found(x: jax.Array) -> Any:
        return jax.grad(lambda x, a: dense(x, [w], [Adapter(a, method)], path)[0].sum(), (0, 1))(x, arrays)

    expected = found(x[0, 0])
    with jax.set_mesh(sharding.make_mesh(4, devices=jax.devices()[:4])):
        got = found(x[0, 0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, expected)


def test_a_kernel_that_is_kept_is_all_gathered_once():
    method, mesh = METHODS["strided"], sharding.make_mesh(1, 4)
    rows, m = sharding.batch(mesh), method.leaves()["m_RR"].layout
    with jax.set_mesh(mesh):
        at = {"m_RR": jax.NamedSharding(mesh, m.choices[0])}
        places = (rows, jax.NamedSharding(mesh, P("fsdp", None)), at)
        again, once = (gathered(gradients(method, COLUMNS, keep, places), mesh) for keep in (False, True))
    assert once["fsdp"] == again["fsdp"] / 2  # the kernel and M


BY_PARTS: dict[str, Method] = {
    "strided": MoRA(2, Share(0)),
    "strided, wrapped": MoRA(2, Share(0, "wrap")),
    "contiguous": MoRA(2, Share(1)),
    "in another order": MoRA(2, Share(1, reorder=True, draw=2)),
    "truncate": MoRA(2, Truncate()),
    "rotate": MoRA(2, Rotate()),
    "spectral": Spectral(16),
}


def test_a_device_s_part_of_a_width_decides_what_is_summed_first(monkeypatch: pytest.MonkeyPatch):
    """By hand: 512 of 2048 outputs are fewer than M's 728, so their product with the sums of x is cheaper."""
    monkeypatch.setattr(mora, "flops_per_byte", lambda: 0.0)
    assert mora._summed_first(2048, 2048, 1, 728) == (True, True)
    assert mora._summed_first(2048, 512, 1, 728) == (True, False)
    asked: list[Any] = []
    monkeypatch.setattr(mora, "_summed_first", lambda *sizes: asked.append(sizes) or (False, False))
    method = METHODS["strided"]
    x, w, arrays = inputs(method)
    with jax.set_mesh(sharding.make_mesh(2, 1, 4)):
        jax.eval_shape(lambda x, dy: method.gradients([arrays], x, dy, (0, D)), x, (x @ w)[:, :, None])
    assert asked == [(K, D // 4, 1, method.shapes(K, D)["m_RR"][0])]


@pytest.mark.parametrize("cost", [0.0, 1e9], ids=["sums first", "product first"])
@pytest.mark.parametrize("side", ["inputs", "outputs"])
@pytest.mark.parametrize("name", BY_PARTS)
def test_over_tensor_nothing_is_all_gathered_for_the_gradient(
    monkeypatch: pytest.MonkeyPatch, name: str, side: str, cost: float
):
    """Each device computes a part from its part of the width, padded to what devices share out."""
    monkeypatch.setattr(mora, "flops_per_byte", lambda: cost)
    method, mesh, (k, d) = BY_PARTS[name], sharding.make_mesh(2, 1, 4), (63, 95)
    x, dy, w = (
        jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(B, T, k), (B, T, 1, d), (k, d)])
    )
    arrays = method.example(jax.random.key(3), w, 0.1)
    (expected,) = jax.jit(method.gradients)([arrays], x, dy)
    if side == "inputs":
        x, divided, places = padded(x, -1, 4), (k, 0), (P("data", None, "tensor"), P("data"))
    else:
        dy, divided, places = padded(dy, -1, 4), (0, d), (P("data"), P("data", None, None, "tensor"))
    x, dy, arrays = jax.device_put(
        (x, dy, arrays), tuple(jax.NamedSharding(mesh, place) for place in (*places, P()))
    )

    @jax.jit
    def gradients(x: jax.Array, dy: jax.Array, arrays: Any) -> jax.Array:
        return method.gradients([arrays], x, dy, divided)[0]["m_RR"]

    with jax.set_mesh(mesh):
        step = gradients.lower(x, dy, arrays).compile()
    assert not collectives(step.as_text(), mesh.shape)
    parts = step(x, dy, arrays)
    assert len(parts) == 8
    np.testing.assert_allclose(parts.sum(0), expected["m_RR"].sum(0), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("widths", "tile", "layout"),
    [
        ((D, D, D), 8, COLUMNS),
        slow((D - 1, D - 1), 8, COLUMNS),
        slow((D, D // 2, D // 2), 8, COLUMNS),
        slow((D - 1, D - 1), 1, COLUMNS),
        slow((D, D), 8, ROWS),
        slow((D - 1, D - 1), 1, None),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("sizes", "shape"),
    [slow((1, 1, 4), (B, T, K)), slow((2, 2, 2), (6, 5, K)), slow((1, 1, 2), (B, K)), ((2, 2, 2), (B, T, K))],
    ids=str,
)
def test_kernels_of_one_input_over_tensor(
    widths: tuple[int, ...],
    tile: int,
    layout: Layout | None,
    sizes: tuple[int, int, int],
    shape: tuple[int, ...],
):
    """Those of one width that divides are stacked to one product, others are not; one has no adapter."""
    method = METHODS["strided"]
    x = jax.random.normal(jax.random.key(5), shape, jnp.bfloat16)  # kernels that need no cast do not stack
    ws = [0.1 * jax.random.normal(jax.random.key(i), (K, d)) for i, d in enumerate(widths)]
    arrays = [method.example(jax.random.key(9 + i), w, 0.1) for i, w in enumerate(ws)]

    @jax.jit
    def gradients(x: jax.Array, ws: Any, arrays: Any) -> Any:
        def loss(x: jax.Array, ws: Any, arrays: Any) -> jax.Array:
            adapters = [None, *(Adapter(a, method) for a in arrays[1:])]
            layouts = [layout] * len(ws) if layout else None
            ys = dense(x, ws, adapters, "merged", tile=tile, layouts=layouts)
            return sum(
                (jnp.sum(jnp.sin(y.astype(jnp.float32)) * (i + 1)) for i, y in enumerate(ys)), jnp.zeros(())
            )

        return jax.grad(loss, argnums=(0, 1, 2))(x, ws, arrays)

    expected = gradients(x, ws, arrays)
    with jax.set_mesh(sharding.make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])):
        got = gradients(x, ws, arrays)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        error = jnp.linalg.norm((a - b).astype(jnp.float32).ravel())
        assert error <= 0.02 * jnp.linalg.norm(b.astype(jnp.float32).ravel())


@dataclasses.dataclass(frozen=True)
class Picked(Method):
    """y = x @ w + x[at] @ m for some inputs, whose numbers are an array of integers."""

    def init(self, key, w):
        return {"m_RD": jnp.zeros((8, w.shape[1])), "at_R": 5 * jnp.arange(8)}

    def leaves(self):
        layout = Layout((P("fsdp"),))
        return {"m_RD": Leaf(), "at_R": Leaf(trainable=False, layout=layout)}

    def weight(self, arrays, w):
        return w.at[arrays["at_R"]].add(arrays["m_RD"])

    def delta(self, arrays, x, d):
        return x[..., arrays["at_R"]] @ arrays["m_RD"]

    def example(self, key, w, std):
        arrays = self.init(key, w)
        return arrays | {"m_RD": std * jax.random.normal(key, arrays["m_RD"].shape)}


class PickedByParts(Picked):
    """The same, with gradients for each shard of the batch."""

    def gradients(self, arrays, x, dy, divided=(0, 0)):
        g_GKD = outer_by_parts(x, dy[..., 0, :])
        return [jax.vmap(jax.vjp(lambda a: self.weight(a, jnp.zeros((K, D))), arrays[0])[1])(g_GKD)[0]]


class PickedWhole(Picked):
    """The same, by the gradient of the kernel."""

    additive = False


def of_floats(method: Any, rows: int, path: Any, plain: bool = False) -> Any:
    """Returns the gradients of a loss of some rows for x, the kernel and the adapter's floating arrays."""
    x, w, arrays = inputs(method)
    floats = {name: a for name, a in arrays.items() if jnp.issubdtype(a.dtype, jnp.floating)}

    @jax.jit
    def found(x: jax.Array, w: jax.Array, floats: Any) -> Any:
        def loss(x: jax.Array, w: jax.Array, floats: Any) -> jax.Array:
            adapter = Adapter(arrays | floats, method)
            y = (
                x @ method.weight(adapter.arrays, w)
                if plain
                else dense(x, [w], [adapter], path, layouts=[COLUMNS])[0]
            )
            return jnp.sum(jnp.sin(y))

        return jax.grad(loss, (0, 1, 2))(x, w, floats)

    return found(x[:rows, : T - 1], w, floats)  # of 63 tokens, so that no shards are cut out of a row


@functools.cache
def on_one_device(method: Any, rows: int) -> Any:
    """Returns the gradients by the plain formula."""
    return jax.tree.map(np.asarray, of_floats(method, rows, "merged", plain=True))


def assert_same(got: Any, expected: Any) -> None:
    """Beside the largest entry of each array."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("path", quick(["merged"], PATHS))
@pytest.mark.parametrize("method", [Picked(), PickedByParts(), PickedWhole()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("sizes", [slow((8, 1, 1)), slow((1, 8, 1)), (2, 2, 2)], ids=str)
def test_an_adapter_with_integers_has_the_gradients_of_the_plain_formula(method: Any, sizes: Any, path: Any):
    expected = on_one_device(method, B)
    with jax.set_mesh(sharding.make_mesh(*sizes)):
        got = of_floats(method, B, path)
    assert_same(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_integers_have_no_gradient_outside_jit_either(path: Any):
    expected = on_one_device(Picked(), B)
    with jax.disable_jit():
        assert_same(of_floats(Picked(), B, path), expected)


RAGGED = [*METHODS.values(), MoRA(8, Rotate(), align=8), LoRA(8), DoRA(8), Spectral(30, multiple=8)]


@pytest.mark.parametrize("rows", [6, slow(3)])  # two parts for four shards or eight, and one
@pytest.mark.parametrize("method", quick([METHODS["strided"], DoRA(8)], RAGGED), ids=str)
@pytest.mark.parametrize("sizes", [slow((8, 1, 1)), slow((1, 8, 1)), (2, 2, 2)], ids=str)
def test_rows_that_do_not_divide_among_devices(method: Any, sizes: Any, rows: int):
    expected = on_one_device(method, rows)
    with jax.set_mesh(sharding.make_mesh(*sizes)):
        got = of_floats(method, rows, "merged")
    assert_same(got, expected)
