"""The contract that every entry of METHODS keeps, with random arrays."""

import dataclasses
import inspect
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mora_jax import methods as method_table
from mora_jax import transform
from mora_jax.errors import InputError
from mora_jax.methods import (
    METHODS,
    OPERATORS,
    Adapter,
    Decouple,
    LoRA,
    Method,
    MoRA,
    Rotate,
    Share,
    Truncate,
    dense,
    mora,
)
from mora_jax.methods.linear import merges_float32
from mora_jax.spectrum import numerical_rank, singular_values

# Every method with a small rank, and variants that take other branches.
CASES: list[Method] = [
    *(method(rank=4) for method in METHODS.values()),  # pyright: ignore[reportCallIssue]
    LoRA(3, alpha=7.0, rslora=True, b_lr_scale=4.0),
    LoRA(3, train_factors="b", a_init="orthogonal"),
    LoRA(3, train_factors="b", a_init="normal"),
    *(MoRA(4, operator()) for operator in OPERATORS.values()),
    MoRA(4, Share(1)),
    MoRA(4, Share((0, 1), "wrap", cycle=4)),
    MoRA(4, Rotate("wrap", "drop"), align=16),
    MoRA(4, align=16),
]
ADDITIVE = [m for m in CASES if m.additive]
PATHS: list[Any] = ["merged", "compressed", "folded", "activation"]
SHAPES = [pytest.param(24, 24, marks=pytest.mark.slow), (20, 33), (33, 20)]
every_case = pytest.mark.parametrize("method", CASES, ids=str)
every_additive = pytest.mark.parametrize("method", ADDITIVE, ids=str)
every_shape = pytest.mark.parametrize(("k", "d"), SHAPES)


def kernel(seed: int, k: int, d: int) -> jax.Array:
    return 0.3 * jax.random.normal(jax.random.key(seed), (k, d))


def random_arrays(method: Method, w: jax.Array, seed: int = 0) -> dict[str, jax.Array]:
    """Arrays as after some training: everything that may be non-zero is random."""
    arrays = method.init(jax.random.key(seed), w)
    keys = jax.random.split(jax.random.key(seed + 1), len(arrays))
    arrays = {
        n: a + 0.3 * jax.random.normal(k, a.shape) for k, (n, a) in zip(keys, arrays.items(), strict=True)
    }
    if isinstance(method, MoRA):  # the padding of m is zero and stays zero
        r = method.r_hat(*w.shape)
        arrays["m_RR"] = jnp.zeros_like(arrays["m_RR"]).at[:r, :r].set(arrays["m_RR"][:r, :r])
    return arrays


@every_case
@every_shape
def test_at_the_start_the_weight_is_the_base(method, k, d):
    w = kernel(0, k, d)
    start = method.weight(method.init(jax.random.key(1), w), w)
    # DoRA divides by the lengths that it multiplies with.
    np.testing.assert_allclose(start, w, rtol=0 if method.additive else 1e-6)


@every_case
@every_shape
def test_leaves_name_the_arrays_of_init_and_all_are_float32(method, k, d):
    arrays = method.init(jax.random.key(0), kernel(0, k, d))
    assert arrays.keys() == method.leaves().keys()
    assert {a.dtype for a in arrays.values()} == {jnp.dtype("float32")}


@every_additive
@every_shape
def test_weight_is_the_base_plus_delta_of_the_identity(method, k, d):
    w = kernel(0, k, d)
    arrays = random_arrays(method, w)
    dw = method.delta(arrays, jnp.eye(k), d)
    assert float(jnp.abs(dw).max()) > 0.1
    np.testing.assert_allclose(method.weight(arrays, w), w + dw, atol=1e-5)


@every_case
@every_shape
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-5), pytest.param("bfloat16", 2e-2, marks=pytest.mark.slow)]
)
def test_dense_is_x_times_weight_on_every_path(method, k, d, path, dtype, tolerance):
    w = kernel(0, k, d)
    adapter = Adapter(random_arrays(method, w), method)
    x = jax.random.normal(jax.random.key(5), (6, k))
    (y,) = dense(x.astype(dtype), [w], [adapter], path)
    assert y.dtype == jnp.dtype(dtype)
    expected = x @ method.weight(adapter.arrays, w)
    assert relative_error(y, expected) < tolerance


@every_case
def test_gradients_of_every_path_are_those_of_the_plain_formula(method):
    k, d = 20, 33
    w, x = kernel(0, k, d), jax.random.normal(jax.random.key(5), (2, 3, k))
    arrays = random_arrays(method, w)
    dy = jax.random.normal(jax.random.key(6), (2, 3, d))

    def plain(x, w, arrays):
        return jnp.sum(dy * (x @ method.weight(arrays, w)))

    def through(path):
        return lambda x, w, arrays: jnp.sum(dy * dense(x, [w], [Adapter(arrays, method)], path)[0])

    expected = jax.grad(plain, argnums=(0, 1, 2))(x, w, arrays)
    for path in PATHS:
        got = jax.jit(jax.grad(through(path), argnums=(0, 1, 2)))(x, w, arrays)
        for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            assert relative_error(g, e) < 1e-5, path


@every_case
def test_a_method_survives_json(method):
    assert method_table.from_json(method_table.to_json(method)) == method


@every_case
def test_a_method_is_hashable_and_follows_itself_after_a_restart(method):
    assert hash(method) == hash(dataclasses.replace(method))  # pyright: ignore[reportArgumentType]
    assert type(method.after_restart()) is type(method)


@pytest.mark.parametrize("method", METHODS.values())
def test_a_method_is_a_frozen_dataclass_with_a_name_and_a_docstring(method):
    assert method.__dataclass_params__.frozen
    assert isinstance(method.name, str)
    assert len(inspect.getdoc(method)) > 40


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_kernels_of_different_methods_stand_side_by_side(dtype, tolerance):
    """In one product where they are cast for it, else in one each."""
    x = jax.random.normal(jax.random.key(5), (6, 24)).astype(dtype)
    ws = [kernel(i, 24, d) for i, d in enumerate((24, 8, 40))]
    methods = [MoRA(4), None, LoRA(4)]
    adapters = [Adapter(random_arrays(m, w), m) if m else None for m, w in zip(methods, ws, strict=True)]
    for path in PATHS:
        ys = dense(x, ws, adapters, path)
        for y, w, a in zip(ys, ws, adapters, strict=True):
            expected = x.astype(jnp.float32) @ (a.method.weight(a.arrays, w) if a else w)
            assert relative_error(y, expected) < tolerance


@pytest.mark.parametrize("path", ["auto", "merged"])
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
        dense(jnp.ones((tokens, 24)), [w], [Adapter(random_arrays(method, w), method)])
        assert bool(calls) != merges


def test_kernels_of_one_product_are_merged_where_that_is_good_for_all():
    methods = [MoRA(4), LoRA(4)]
    assert [merges_float32(tokens, "auto", methods) for tokens in (2047, 2048)] == [False, True]
    assert merges_float32(1, "merged", methods)
    assert not merges_float32(4096, "activation", methods)


@pytest.mark.parametrize(
    ("flops_per_byte", "align"),
    [(0, 8), (0, 1), (5, 1), (10**9, 8)],
    ids=["sums first", "sums first, M not padded", "mixed, M not padded", "product first"],
)
@pytest.mark.parametrize(
    "operator",
    [Share(0), Share(1), Share((0, 1), "wrap"), Truncate(), Decouple(), Decouple("wrap", "drop")],
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

    expected = jax.grad(through)(arrays, "activation", "float32")
    for path, dtype in itertools.product(("merged", "compressed", "folded"), ("float32", "bfloat16")):
        got = jax.grad(through)(arrays, path, dtype)
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


@pytest.mark.parametrize(("k", "d"), [(90, 90), (50, 90), (90, 50)])
def test_blocks_turned_behind_the_product_give_the_gradient_of_blocks_turned_before(k, d, monkeypatch):
    """As many blocks of outputs as of inputs, more, and fewer, none of them full at the end."""
    monkeypatch.setattr(mora, "flops_per_byte", lambda: 10**9)
    method = MoRA(4, Rotate(), align=8)
    arrays = [random_arrays(method, kernel(0, k, d))]
    x, dy = (jax.random.normal(jax.random.key(i), (50, width)) for i, width in enumerate((k, d)))
    (expected,) = method.compressed_gradients(arrays, x, dy[:, None])
    monkeypatch.delattr(MoRA, "delta")  # which would turn x
    (got,) = method.gradients(arrays, x, dy[:, None])
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


@every_case
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [pytest.param("float32", 1e-5, marks=pytest.mark.slow), ("bfloat16", 1e-2)]
)
def test_whole_tiles_change_nothing_but_add_zeros(method, path, dtype, tolerance):
    """Outputs widened, and an input that was widened before, against the kernels as they are.

    Kernels of float32 share a product where it is computed in bfloat16.
    """
    ws = [kernel(i, 20, 33) for i in range(2)]
    adapters = [Adapter(random_arrays(method, w, i), method) for i, w in enumerate(ws)]
    x, wide = jax.random.normal(jax.random.key(5), (6, 20)).astype(dtype), [(0, 0), (0, 12)]

    def total(x, ws, arrays, tile):
        ys = dense(x, ws, [Adapter(a, method) for a in arrays], path, tile=tile)
        assert [y.shape[-1] for y in ys] == [-(-33 // tile) * tile] * 2
        return sum(jnp.sum(jnp.sin(y.astype(jnp.float32))) for y in ys)  # sin(0) = 0

    arrays = [a.arrays for a in adapters]
    plain = jax.grad(total, argnums=(0, 1, 2))(x, ws, arrays, 1)
    tiled = jax.grad(total, argnums=(0, 1, 2))(jnp.pad(x, wide), ws, arrays, 16)
    np.testing.assert_allclose(
        total(jnp.pad(x, wide), ws, arrays, 16), total(x, ws, arrays, 1), rtol=tolerance
    )
    assert relative_error(tiled[0][:, :20], plain[0]) < tolerance
    for t, p in zip(jax.tree.leaves(tiled[1:]), jax.tree.leaves(plain[1:]), strict=True):
        assert relative_error(t, p) < tolerance


def test_kernels_that_need_no_cast_are_not_copied_side_by_side():
    ws = [kernel(i, 24, 24) for i in range(3)]
    for dtype, copies in (("float32", False), ("bfloat16", True)):
        x = jnp.ones((4, 24), dtype)
        text = str(jax.make_jaxpr(lambda x: dense(x, ws, [None] * 3))(x))
        assert ("[24,72]" in text) == copies


@pytest.mark.parametrize("operator", [Share(), Rotate()], ids=str)
def test_products_take_whole_rows_of_an_m_that_is_stored_without_padding(operator, monkeypatch):
    monkeypatch.setattr(mora, "FLOPS_PER_BYTE", 0)  # so that sums and cuts come before the product
    method, w = MoRA(4, operator), kernel(0, 90, 90)
    arrays = random_arrays(method, w)
    assert arrays["m_RR"].shape == (26, 26)
    for path in ("merged", "activation"):
        gradient = jax.grad(lambda a, p=path: jnp.sum(dense(w, [w], [Adapter(a, method)], p)[0] ** 3))
        products = re.findall(r"\[([0-9,]+)\] = dot_general", str(jax.make_jaxpr(gradient)(arrays)))
        sides = {int(side) for shape in products for side in shape.split(",")}
        assert 32 in sides
        assert 26 not in sides
        assert gradient(arrays)["m_RR"].shape == (26, 26)


def test_padding_of_m_has_exactly_zero_gradient():
    method, w = MoRA(4, align=16), kernel(0, 24, 20)
    r_hat = method.r_hat(24, 20)
    arrays = random_arrays(method, w)
    assert arrays["m_RR"].shape == (16, 16)
    assert r_hat == 13
    for path in ("merged", "activation"):
        g = jax.grad(lambda a, p=path: jnp.sum(dense(w.T, [w], [Adapter(a, method)], p)[0] ** 3))(arrays)[
            "m_RR"
        ]
        assert np.count_nonzero(g[:r_hat, :r_hat]) == r_hat**2
        assert np.count_nonzero(g) == r_hat**2


@pytest.mark.parametrize(
    ("k", "d", "rank", "r_hat"),
    [(768, 768, 128, 443), (768, 2560, 128, 652), (2048, 2048, 128, 724), (24, 20, 99, 20)],
)
def test_r_hat_matches_the_count_of_lora(k, d, rank, r_hat):
    assert MoRA(rank).r_hat(k, d) == r_hat
    assert r_hat**2 <= (k + d) * rank


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": "mroa"}, "did you mean mora"),
        ({"name": "mora", "rnk": 3}, "did you mean rank"),
        ({"name": "mora", "operator": {"name": "shar"}}, "did you mean share"),
        ({"name": "mora", "rank": 0}, "at least 1"),
        ({"name": "lora", "rank": 0}, "at least 1"),
        ({"name": "dora", "rank": 0}, "at least 1"),
        ({"name": "lora", "train_factors": "a"}, "trains 'ab' or 'b'"),
        ({"name": "lora", "a_init": "ones"}, "a_init is"),
        ({"name": "lora", "dropout": 1.0}, "dropout lies in"),
        ({"name": "mora", "dropout": -0.1}, "dropout lies in"),
        ({"name": "mora", "operator": {"name": "rotate", "surplus": "keep"}}, "rotate's surplus is"),
        ({"name": "mora", "operator": {"name": "share", "cycle": 3}}, "share's cycle is"),
        (["mora"], "mapping with a name"),
        ({"name": "mora", "rank": "eight"}, "mora's rank is of type int, not 'eight'"),
        ({"name": "mora", "rank": None}, "mora's rank is of type int, not None"),
        ({"name": "mora", "rank": 8.5}, "mora's rank is of type int"),
        ({"name": "mora", "rank": True}, "mora's rank is of type int"),
        ({"name": "lora", "alpha": "much"}, "lora's alpha is a number"),
        ({"name": "lora", "alpha": float("nan")}, "alpha is finite"),
        ({"name": "dora", "alpha": float("inf")}, "alpha is finite"),
        ({"name": "lora", "rslora": "yes"}, "rslora is of type bool"),
        ({"name": "mora", "operator": {"name": "share", "group": True}}, "group type is"),
    ],
)
def test_bad_json_is_refused_with_the_nearest_name(data, message):
    with pytest.raises(InputError, match=message):
        method_table.from_json(data)


@every_case
@every_shape
def test_the_count_is_that_of_the_arrays_without_padding(method, k, d):
    arrays = random_arrays(method, kernel(0, k, d))
    trained = [n for n, leaf in method.leaves().items() if leaf.trainable]
    assert method.count(k, d) == sum(np.count_nonzero(arrays[n]) for n in trained)
    if isinstance(method, MoRA):
        assert method.count(k, d) <= LoRA(method.rank).count(k, d)


@every_case
@every_shape
def test_the_update_reaches_the_rank_that_is_promised(method, k, d):
    w = kernel(0, k, d)
    after = method.weight(random_arrays(method, w), w)
    rank = numerical_rank(singular_values({"w": w}, {"w": after})["w"])
    assert int(rank) == method.rank_bound(k, d)


def test_mora_reaches_r_hat_where_lora_stays_at_its_rank():
    w = kernel(0, 96, 80)
    ranks = {}
    for method in (MoRA(4), LoRA(4)):
        after = method.weight(random_arrays(method, w), w)
        ranks[method.name] = int(numerical_rank(singular_values({"w": w}, {"w": after})["w"]))
    assert ranks == {"mora": 26, "lora": 4}  # floor(sqrt((96 + 80) 4))


@pytest.mark.parametrize(
    ("operator", "grows"),
    [(Share(), True), (Share(cycle=4), True), (Truncate(), False), (None, False)],
    ids=str,
)
def test_the_sum_of_updates_gains_rank_after_a_restart_only_where_the_group_type_changed(operator, grows):
    """`None` is sharing whose group type is held by hand."""
    params = {"w": kernel(0, 96, 80)}
    methods = transform.assign([("w", MoRA(2, operator or Share()))], params)
    now, ranks = params, []
    for seed in range(3):
        arrays = {"w": random_arrays(methods["w"], params["w"], seed)}  # pyright: ignore[reportArgumentType]
        now, _, following = transform.restart(jax.random.key(seed), now, arrays, methods)
        methods = following if operator else methods
        ranks.append(int(numerical_rank(singular_values(params, now)["w"])))
    side = MoRA(2).r_hat(96, 80)
    assert ranks[0] == side
    assert (ranks[1] > side) == grows
    assert (ranks[2] > side) == grows


@pytest.mark.parametrize("method", [LoRA(4, dropout=0.25), MoRA(4, dropout=0.25)], ids=str)
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


def test_the_frozen_factor_of_asylora_gets_no_group():
    params = {"w": kernel(0, 24, 20)}
    methods = transform.assign([("w", LoRA(3, train_factors="b", b_lr_scale=2.0))], params)
    assert methods.trainable() == {"adapters/w/b_RD": transform.Group(adapter=True, lr_scale=2.0)}


def test_orthogonal_factors_are_orthogonal():
    a_KR = LoRA(5, a_init="orthogonal").init(jax.random.key(0), kernel(0, 24, 20))["a_KR"]
    np.testing.assert_allclose(a_KR.T @ a_KR, np.eye(5), atol=1e-5)


@pytest.mark.parametrize("method", CASES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stacked_kernels_merge_as_they_apply(method, dtype):
    """Merge then forward is forward, layer by layer, with random arrays."""
    w_LKD = jnp.stack([kernel(i, 20, 33) for i in range(3)])
    methods = transform.assign([("w", method)], {"w": w_LKD})
    arrays = jax.vmap(lambda w, i: random_arrays(method, w, i))(w_LKD, jnp.arange(3))
    merged_LKD = transform.merge({"w": w_LKD}, {"w": arrays}, methods)["w"]
    x = jax.random.normal(jax.random.key(9), (5, 20)).astype(dtype)
    for i in range(3):
        adapter = Adapter(jax.tree.map(lambda a, i=i: a[i], arrays), method)
        (y,) = dense(x, [w_LKD[i]], [adapter], "merged")
        assert relative_error(y, x.astype("float32") @ merged_LKD[i]) < (1e-5 if dtype == "float32" else 1e-2)


def test_numbers_that_yaml_reads_as_strings_are_numbers():
    assert method_table.from_json({"name": "lora", "alpha": "1e2", "dropout": 0}) == LoRA(alpha=100.0)


def test_a_kernel_too_thin_for_the_operator_is_refused():
    with pytest.raises(InputError, match="too thin"):
        MoRA(4, Rotate()).r_hat(1, 20)


def relative_error(got: jax.Array, expected: jax.Array) -> float:
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
