"""The contract that every entry of METHODS keeps, with random arrays."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_cases import (
    costly_case,
    every_additive,
    every_case,
    every_shape,
    kernel,
    random_arrays,
    relative_error,
)
from slow import quick, slow

from mora_jax import methods as method_table
from mora_jax import transform
from mora_jax.errors import InputError
from mora_jax.methods import (
    METHODS,
    Adapter,
    LoRA,
    MoRA,
    Rotate,
    Share,
    Truncate,
    dense,
)
from mora_jax.on import On
from mora_jax.spectrum import numerical_rank, singular_values


@costly_case
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
        ({"name": "lora", "train_factors": "a"}, "train_factors is 'ab' or 'b'"),
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
        ({"name": "lora", "alpha": 0.0}, "alpha is finite and above 0, not 0.0"),
        ({"name": "lora", "rslora": "yes"}, "rslora is of type bool"),
        ({"name": "mora", "operator": {"name": "share", "group": True}}, "group type is"),
    ],
)
def test_bad_json_is_refused_with_the_nearest_name(data, message):
    with pytest.raises(InputError, match=message):
        method_table.from_json(data)


@costly_case
@every_shape
def test_the_count_is_that_of_the_arrays_without_padding(method, k, d):
    arrays = random_arrays(method, kernel(0, k, d))
    trained = [n for n, leaf in method.leaves().items() if leaf.trainable]
    assert method.count(k, d) == sum(np.count_nonzero(arrays[n]) for n in trained)
    if isinstance(method, MoRA):
        assert method.count(k, d) <= LoRA(method.rank).count(k, d)


@costly_case
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
    [(Share(), True), slow(Share(cycle=4), True), (Truncate(), False), (None, False)],
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


def test_the_frozen_factor_of_asylora_gets_no_group():
    params = {"w": kernel(0, 24, 20)}
    methods = transform.assign([("w", LoRA(3, train_factors="b", b_lr_scale=2.0))], params)
    assert methods.trainable() == {"adapters/w/b_RD": transform.Group(adapter=True, lr_scale=2.0)}


def test_orthogonal_factors_are_orthogonal():
    a_KR = LoRA(5, a_init="orthogonal").init(jax.random.key(0), kernel(0, 24, 20))["a_KR"]
    np.testing.assert_allclose(a_KR.T @ a_KR, np.eye(5), atol=1e-5)


@costly_case
@pytest.mark.parametrize("dtype", quick(["float32"], ["float32", "bfloat16"]))
def test_stacked_kernels_merge_as_they_apply(method, dtype):
    """Merge then forward is forward, layer by layer, with random arrays."""
    w_LKD = jnp.stack([kernel(i, 20, 33) for i in range(3)])
    methods = transform.assign([("w", On(method, stack=(0,)))], {"w": w_LKD})
    arrays = jax.vmap(lambda w, i: random_arrays(method, w, i))(w_LKD, jnp.arange(3))
    merged_LKD = transform.merge({"w": w_LKD}, {"w": arrays}, methods)["w"]
    x = jax.random.normal(jax.random.key(9), (5, 20)).astype(dtype)

    @jax.jit
    def forward(i, arrays):
        return dense(x, [w_LKD[i]], [Adapter(jax.tree.map(lambda a: a[i], arrays), method)], "merged")

    for i in range(3):
        (y,) = forward(i, arrays)
        assert relative_error(y, x.astype("float32") @ merged_LKD[i]) < (1e-5 if dtype == "float32" else 1e-2)


def test_numbers_that_yaml_reads_as_strings_are_numbers():
    assert method_table.from_json({"name": "lora", "alpha": "1e2", "dropout": 0}) == LoRA(alpha=100.0)


def test_a_kernel_too_thin_for_the_operator_is_refused():
    with pytest.raises(InputError, match="too thin"):
        MoRA(4, Rotate()).r_hat(1, 20)
