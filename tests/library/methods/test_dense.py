"""`dense`: every path and order of products gives one value and one gradient, for every method."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_cases import CASES, PATHS, QUICK, SHAPES, costly_case, kernel, random_arrays, relative_error
from slow import quick, slow

from mora_jax.methods import (
    Adapter,
    Decouple,
    DoRA,
    LoRA,
    MoRA,
    Rotate,
    Share,
    Truncate,
    dense,
    mora,
)
from mora_jax.methods.linear import merges_float32


@pytest.mark.parametrize("method", quick([*QUICK[:2], DoRA(4)], CASES), ids=str)
@pytest.mark.parametrize(("k", "d"), quick([(33, 20)], SHAPES))
@pytest.mark.parametrize(
    ("dtype", "tolerance"), quick([("float32", 1e-5)], [("float32", 1e-5), ("bfloat16", 2e-2)])
)
def test_dense_is_x_times_weight_on_every_path(method, k, d, dtype, tolerance):
    w = kernel(0, k, d)
    x = jax.random.normal(jax.random.key(5), (6, k))

    @jax.jit  # one program for all paths: they compile faster together
    def results(x, w, arrays):
        adapter = Adapter(arrays, method)
        ys = {path: dense(x.astype(dtype), [w], [adapter], path)[0] for path in PATHS}
        return ys, x @ method.weight(arrays, w)

    ys, expected = results(x, w, random_arrays(method, w))
    for path, y in ys.items():
        assert y.dtype == jnp.dtype(dtype)
        assert relative_error(y, expected) < tolerance, path


@costly_case
def test_gradients_of_every_path_are_those_of_the_plain_formula(method):
    k, d = 20, 33
    w, x = kernel(0, k, d), jax.random.normal(jax.random.key(5), (2, 3, k))
    arrays = random_arrays(method, w)
    dy = jax.random.normal(jax.random.key(6), (2, 3, d))

    def plain(x, w, arrays):
        return jnp.sum(dy * (x @ method.weight(arrays, w)))

    def through(path):
        return lambda x, w, arrays: jnp.sum(dy * dense(x, [w], [Adapter(arrays, method)], path)[0])

    @jax.jit
    def gradients(*args):
        functions = {"plain": plain} | {path: through(path) for path in PATHS}
        return {name: jax.grad(f, argnums=(0, 1, 2))(*args) for name, f in functions.items()}

    found = gradients(x, w, arrays)
    expected = found.pop("plain")
    for path, got in found.items():
        for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            assert relative_error(g, e) < 1e-5, path


@pytest.mark.parametrize(("dtype", "tolerance"), [slow("float32", 1e-5), ("bfloat16", 1e-2)])
def test_kernels_of_different_methods_stand_side_by_side(dtype, tolerance):
    """In one product where they are cast for it, else in one each."""
    x = jax.random.normal(jax.random.key(5), (6, 24)).astype(dtype)
    ws = [kernel(i, 24, d) for i, d in enumerate((24, 8, 40))]
    methods = [MoRA(4), None, LoRA(4)]
    adapters = [Adapter(random_arrays(m, w), m) if m else None for m, w in zip(methods, ws, strict=True)]
    found = jax.jit(lambda x, ws, adapters: [dense(x, ws, adapters, path) for path in PATHS])
    for ys in found(x, ws, adapters):
        for y, w, a in zip(ys, ws, adapters, strict=True):
            expected = x.astype(jnp.float32) @ (a.method.weight(a.arrays, w) if a else w)
            assert relative_error(y, expected) < tolerance


@pytest.mark.parametrize("path", [slow("auto"), "merged"])
def test_a_small_update_survives_a_bfloat16_base(path):
    method, w = MoRA(4), kernel(0, 24, 24).astype(jnp.bfloat16)
    arrays = {"m_RR": 1e-6 * random_arrays(method, w)["m_RR"]}
    x = jax.random.normal(jax.random.key(5), (4096, 24))
    with jax.default_matmul_precision("highest"):
        (y,) = dense(x, [w], [Adapter(arrays, method)], path)
        update = y - x @ w.astype(jnp.float32)
    assert relative_error(update, method.delta(arrays, x, 24)) < 0.1


@pytest.mark.parametrize(("method", "least"), [(MoRA(4), 1024), (LoRA(4), 2048)], ids=["MoRA", "LoRA"])
def test_auto_takes_the_merged_path_for_many_tokens_only(method, least, monkeypatch):
    calls = []
    delta = type(method).delta
    monkeypatch.setattr(type(method), "delta", lambda *args: calls.append(args) or delta(*args))
    w = kernel(0, 24, 24)
    for tokens, merges in ((least - 1, False), (least, True)):
        calls.clear()
        adapter = Adapter(random_arrays(method, w), method)
        jax.eval_shape(lambda x, a=adapter: dense(x, [w], [a]), jnp.ones((tokens, 24)))
        assert bool(calls) != merges


def test_kernels_of_one_product_are_merged_where_that_is_good_for_all():
    methods = [MoRA(4), LoRA(4)]
    assert [merges_float32(tokens, "auto", methods) for tokens in (2047, 2048)] == [False, True]
    assert merges_float32(1, "merged", methods)
    assert not merges_float32(4096, "activation", methods)


@pytest.mark.parametrize(
    ("flops_per_byte", "align"),
    [slow(0, 8), slow(0, 1), (5, 1), slow(10**9, 8)],
    ids=["sums first", "sums first, M not padded", "mixed, M not padded", "product first"],
)
@pytest.mark.parametrize(
    "operator",
    quick(
        [Share((0, 1), "wrap"), Decouple("wrap", "drop")],
        [Share(0), Share(1), Share((0, 1), "wrap"), Truncate(), Decouple(), Decouple("wrap", "drop")],
    ),
    ids=str,
)
def test_sums_and_blocks_before_or_after_the_product_give_one_gradient(
    operator, flops_per_byte, align, monkeypatch
):
    """Every combination of sides, for kernels that share a product and one of another shape, M as it is and
    padded.

    Of small whole numbers, whose products and sums are exact in bfloat16, too.
    """
    monkeypatch.setattr(mora, "flops_per_byte", lambda: flops_per_byte)
    method = MoRA(4, operator, align=align)
    ws = [kernel(i, 90, d) for i, d in enumerate((90, 90, 60))]
    arrays = [random_arrays(method, w, seed) for seed, w in enumerate(ws)]
    x, *dys = (
        jax.random.randint(jax.random.key(i), (50, width), -2, 3).astype(jnp.float32)
        for i, width in enumerate((90, 90, 90, 60))
    )

    def through(arrays, path, dtype):
        ys = dense(x.astype(dtype), ws, [Adapter(a, method) for a in arrays], path)
        return sum(jnp.sum(dy * y.astype(jnp.float32)) for y, dy in zip(ys, dys, strict=True))

    ways = list(itertools.product(("merged", "compressed", "folded"), ("float32", "bfloat16")))

    @jax.jit
    def gradients(arrays):
        return [jax.grad(through)(arrays, *way) for way in (("activation", "float32"), *ways)]

    expected, *found = gradients(arrays)
    for (path, dtype), got in zip(ways, found, strict=True):
        for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            assert relative_error(g, e) < 1e-5, (path, dtype)


def test_the_cheapest_order_of_sums_and_product_follows_the_sizes():
    """The layers of the 250M and 1.3B models: x, then dy."""
    order = mora._summed_first
    for r_443, r_652 in ((448, 704), (512, 768)):  # padded to 64 and to 128
        assert order(768, 768, 3, r_443) == (True, False)  # q, k and v
        assert order(768, 768, 1, r_443) == (False, False)  # o
        assert order(768, 2560, 2, r_652) == (False, True)  # gate and up
        assert order(2560, 768, 1, r_652) == (True, False)  # down
    for k, d, kernels, side in ((2048, 2048, 3, 768), (2048, 2048, 1, 768), (2048, 5461, 2, 1024)):
        assert order(k, d, kernels, side) == (True, True)
    assert order(5461, 2048, 1, 1024) == (True, True)


@pytest.mark.parametrize(("k", "d"), quick([(50, 90)], [(90, 90), (50, 90), (90, 50)]))
def test_blocks_turned_behind_the_product_give_the_gradient_of_blocks_turned_before(k, d, monkeypatch):
    """As many blocks of outputs as of inputs, more, and fewer, none of them full at the end."""
    monkeypatch.setattr(mora, "flops_per_byte", lambda: 10**9)
    method = MoRA(4, Rotate(), align=8)
    arrays = [random_arrays(method, kernel(0, k, d))]
    x, dy = (jax.random.normal(jax.random.key(i), (50, width)) for i, width in enumerate((k, d)))
    (expected,) = jax.jit(method.compressed_gradients)(arrays, x, dy[:, None])
    monkeypatch.delattr(MoRA, "delta")  # which would turn x
    (got,) = jax.jit(method.gradients)(arrays, x, dy[:, None])
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, expected)
    assert relative_error(got["m_RR"], expected["m_RR"]) < 1e-5


def test_whether_activations_are_cut_into_blocks_follows_the_sizes():
    """The layers of the 250M and 1.3B models at rank 8; kernels of a product together."""

    def layers(hidden, wide, narrow_side, wide_side):
        for k, d, kernels, side in (
            (hidden, hidden, 3, narrow_side),
            (hidden, hidden, 1, narrow_side),
            (hidden, wide, 2, wide_side),
            (wide, hidden, 1, wide_side),
        ):
            r_hat = MoRA(8, Rotate()).r_hat(k, d)
            yield mora._cut_first(k, d, kernels, side, Rotate().blocks(r_hat, k, d))

    assert not any(layers(768, 2560, 128, 192))
    assert all(layers(2048, 5461, 192, 256))
    assert mora._cut_first(768, 768, 3, 448, Truncate().blocks(443, 768, 768))


@pytest.mark.parametrize("method", quick([MoRA(4)], CASES), ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [slow("float32", 1e-5), ("bfloat16", 1e-2)])
def test_whole_tiles_change_nothing_but_add_zeros(method, dtype, tolerance):
    """Outputs widened, and an input that was widened before, against the kernels as they are.

    Kernels of float32 share a product where it is computed in bfloat16.
    """
    ws = [kernel(i, 20, 33) for i in range(2)]
    arrays = [random_arrays(method, w, i) for i, w in enumerate(ws)]
    x, wide = jax.random.normal(jax.random.key(5), (6, 20)).astype(dtype), [(0, 0), (0, 12)]

    def total(x, ws, arrays, path, tile):
        ys = dense(x, ws, [Adapter(a, method) for a in arrays], path, tile=tile)
        assert [y.shape[-1] for y in ys] == [-(-33 // tile) * tile] * 2
        return sum(jnp.sum(jnp.sin(y.astype(jnp.float32))) for y in ys)  # sin(0) = 0

    @jax.jit
    def values_and_gradients(x, ws, arrays):
        both = jax.value_and_grad(total, argnums=(0, 1, 2))
        wider = jnp.pad(x, wide)
        return {p: (both(x, ws, arrays, p, 1), both(wider, ws, arrays, p, 16)) for p in PATHS}

    for path, ((value, plain), (wide_value, tiled)) in values_and_gradients(x, ws, arrays).items():
        np.testing.assert_allclose(wide_value, value, rtol=tolerance, err_msg=path)
        assert relative_error(tiled[0][:, :20], plain[0]) < tolerance, path
        for t, p in zip(jax.tree.leaves(tiled[1:]), jax.tree.leaves(plain[1:]), strict=True):
            assert relative_error(t, p) < tolerance, path


def test_kernels_that_need_no_cast_are_not_copied_side_by_side():
    ws = [kernel(i, 24, 24) for i in range(3)]
    for dtype, copies in (("float32", False), ("bfloat16", True)):
        x = jnp.ones((4, 24), dtype)
        text = str(jax.make_jaxpr(lambda x: dense(x, ws, [None] * 3))(x))
        assert ("[24,72]" in text) == copies


@pytest.mark.parametrize("operator", quick([Share()], [Share(), Rotate()]), ids=str)
def test_products_take_whole_rows_of_an_m_that_is_stored_without_padding(operator, monkeypatch):
    monkeypatch.setattr(mora, "flops_per_byte", lambda: 0)  # so that sums and cuts come before the product
    method, w = MoRA(4, operator), kernel(0, 90, 90)
    arrays = random_arrays(method, w)
    assert arrays["m_RR"].shape == (26, 26)
    for path in ("merged", "activation"):
        gradient = jax.grad(lambda a, p=path: jnp.sum(dense(w, [w], [Adapter(a, method)], p)[0] ** 3))
        products = re.findall(r"\[([0-9,]+)\] = dot_general", str(jax.make_jaxpr(gradient)(arrays)))
        sides = {int(side) for shape in products for side in shape.split(",")}
        assert 32 in sides
        assert 26 not in sides
        assert jax.eval_shape(gradient, arrays)["m_RR"].shape == (26, 26)


def test_padding_of_m_has_exactly_zero_gradient():
    method, w = MoRA(4, align=16), kernel(0, 24, 20)
    r_hat = method.r_hat(24, 20)
    arrays = random_arrays(method, w)
    assert arrays["m_RR"].shape == (16, 16)
    assert r_hat == 13
    for path in ("merged", "activation"):
        gradient = jax.grad(lambda a, p=path: jnp.sum(dense(w.T, [w], [Adapter(a, method)], p)[0] ** 3))
        g = jax.jit(gradient)(arrays)["m_RR"]
        assert np.count_nonzero(g[:r_hat, :r_hat]) == r_hat**2
        assert np.count_nonzero(g) == r_hat**2


@pytest.mark.parametrize("method", [slow(LoRA(4, dropout=0.25)), MoRA(4, dropout=0.25)], ids=str)
def test_dropout_spares_the_base_takes_the_activation_path_and_has_the_right_mean(method):
    w, x = kernel(0, 24, 20), jnp.ones((4000, 24))
    adapter = Adapter(random_arrays(method, w), method)
    (y,) = dense(x, [w], [adapter], "merged", jax.random.key(0))
    expected = x @ method.weight(adapter.arrays, w)
    assert relative_error(y, expected) > 0.05
    np.testing.assert_allclose(y.mean(axis=0), expected[0], atol=0.05 * float(jnp.abs(expected).max()))
    (without,) = dense(x, [w], [adapter], "merged")
    np.testing.assert_allclose(without, expected, atol=1e-4)
    silent = Adapter(jax.tree.map(jnp.zeros_like, adapter.arrays), method)
    np.testing.assert_allclose(dense(x, [w], [silent], "auto", jax.random.key(0))[0], x @ w, atol=1e-5)


@pytest.mark.slow
def test_dropout_draws_the_same_whether_or_not_kernels_share_a_product():
    """As under a mesh that divides them, where each has a product of its own."""
    method, key = LoRA(4, dropout=0.5), jax.random.key(0)
    ws = [kernel(i, 24, 20) for i in range(3)]
    adapters = [Adapter(random_arrays(method, w, i), method) for i, w in enumerate(ws)]
    x = jnp.ones((8, 24), jnp.bfloat16)
    together = dense(x, ws, adapters, dropout_key=key)
    for i, (w, a) in enumerate(zip(ws, adapters, strict=True)):
        (alone,) = dense(x, [w], [a], dropout_key=jax.random.fold_in(key, i))
        assert relative_error(alone, together[i]) < 1e-2
    apart = dense(x, [w.astype(jnp.bfloat16) for w in ws], adapters, dropout_key=key)
    for y, other in zip(together, apart, strict=True):
        assert relative_error(y, other) < 2e-2
