"""MoRA's operators against their definition by index, against each other and against recorded numbers."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slow import quick

from mora_jax.errors import InputError
from mora_jax.methods.operators import Decouple, Rotate, Share, Truncate
from mora_jax.methods.order import LARGEST_STRIDE, Order

SHARES = [Share(g, p) for g, p in itertools.product([0, 1, (0, 1), (1, 0)], ["zero", "wrap"])]


def group_of(j: int, width: int, r_hat: int, group: int) -> int:
    """The group of place j, from the definition."""
    if group == 0:
        return j % r_hat
    edges = np.cumsum([width // r_hat + (g < width % r_hat) for g in range(r_hat)])
    return int(np.searchsorted(edges, j, side="right"))


def matrix_by_index(share: Share, m: np.ndarray, k: int, d: int) -> np.ndarray:
    g_in, g_out = share.groups
    r_hat = m.shape[0]
    rows = [group_of(j, k, r_hat, g_in) for j in range(k)]
    columns = [group_of(i, d, r_hat, g_out) for i in range(d)]
    dw = m[np.ix_(rows, columns)].copy()
    if share.pad == "wrap" and g_in == 0:  # places k, k+1, ... hold the first inputs again
        for j in range(-k % r_hat):
            dw[j % k] += m[(k + j) % r_hat][columns]
    return dw


@functools.partial(jax.jit, static_argnums=(0, 3))
def both_ways(operator, x, m, d):
    """What x becomes through the operator, and the operator's matrix. In one program: it compiles faster."""
    y = operator.decompress(operator.compress(x, len(m), d) @ m, d)
    return y, operator.matrix(m, x.shape[-1], d)


# Orders of restarts: those of seeds 0 and 1, and many draws.
REORDERED = [
    *(
        Share(g, p, reorder=True, draw=n)
        for n, (g, p) in enumerate(itertools.product([0, 1, (0, 1)], ["zero", "wrap"]), 1)
    ),
    *(
        o(p, s, reorder=True, seed=1, draw=5)
        for o in (Decouple, Rotate)
        for p, s in (("zero", "fold"), ("wrap", "drop"))
    ),
]

shapes = st.tuples(st.integers(1, 40), st.integers(1, 40)).flatmap(
    lambda kd: st.tuples(st.just(kd[0]), st.just(kd[1]), st.integers(1, kd[0]))
)


@settings(max_examples=25, deadline=None)
@given(shapes, st.sampled_from(SHARES), st.integers(0, 2**31))
def test_share_is_its_definition_by_index(shape, share, seed):
    k, d, r_hat = shape
    rng = np.random.default_rng(seed)
    m, x = rng.normal(size=(r_hat, r_hat)).astype("f4"), rng.normal(size=(3, k)).astype("f4")
    dw = matrix_by_index(share, m, k, d)
    y, matrix = both_ways(share, x, m, d)
    np.testing.assert_allclose(matrix, dw, rtol=1e-6)
    np.testing.assert_allclose(y, x @ dw, atol=1e-4)


def place_of(j: int, width: int, order: Order) -> int:
    """Where an order puts place j, from its definition: the family of permutations p of the module."""
    j = (j + int(order.shift * width)) % width
    s = min(order.stride, width)
    return (j % s) * (width // s) + min(j % s, width % s) + j // s


@functools.partial(jax.jit, static_argnums=(0, 2))
def there_and_back(order, x, axis):
    """An array in an order, and back again. In one program: it compiles faster."""
    there = order(x, axis)
    return there, order.back(there, axis)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, LARGEST_STRIDE), st.floats(0, 1, exclude_max=True), st.booleans())
def test_an_order_is_its_definition_and_back_is_its_inverse(width, stride, shift, last):
    order, axis = Order(stride, shift), int(last)
    x = np.arange(3.0 * width).reshape((3, width) if last else (width, 3))
    there, back = there_and_back(order, x.astype(np.float32), axis)
    there = np.asarray(there)
    for j in range(width):
        np.testing.assert_array_equal(there.take(place_of(j, width, order), axis), x.take(j, axis))
    np.testing.assert_array_equal(back, x)


@pytest.mark.parametrize(
    ("k", "d", "r_hat"), quick([(20, 33, 6)], [(24, 24, 8), (20, 33, 6), (33, 20, 6), (50, 30, 14)])
)
@pytest.mark.parametrize("operator", REORDERED, ids=str)
def test_a_reordered_operator_is_the_plain_one_on_reordered_places(operator, k, d, r_hat):
    m = np.random.default_rng(k).normal(size=(r_hat, r_hat)).astype("f4")
    matrix = jax.jit(
        lambda m: (dataclasses.replace(operator, draw=0).matrix(m, k, d), operator.matrix(m, k, d))
    )
    plain, reordered = map(np.asarray, matrix(m))
    o_in, o_out = operator.orders
    places = [[place_of(j, width, o) for j in range(width)] for width, o in ((k, o_in), (d, o_out))]
    np.testing.assert_allclose(reordered, plain[np.ix_(*places)], rtol=1e-6)


@pytest.mark.parametrize(
    "operator", [Share(reorder=True), Share(cycle=4), Decouple(reorder=True), Truncate()], ids=str
)
def test_several_restarts_are_that_many_single_ones(operator):
    one_by_one = operator
    for restarts in range(7):
        assert operator.switched(restarts) == one_by_one
        one_by_one = one_by_one.switched()


def directions(operator) -> float:
    """Returns the share of the directions of a kernel that the sum of eight restarts' updates can reach."""
    k, r_hat, found = 24, 14, []
    for _ in range(8):
        jacobian = jax.jit(jax.jacobian(lambda m, each=operator: each.matrix(m, k, k)))(
            np.zeros((r_hat, r_hat), np.float32)
        )
        found.append(np.asarray(jacobian).reshape(k * k, -1))
        operator = operator.switched()
    return np.linalg.matrix_rank(np.concatenate(found, 1), tol=1e-4) / k**2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operator", "least"),
    quick([(Share(reorder=True), 1.0)], [(Share(reorder=True), 1.0), (Rotate(reorder=True), 0.99)]),
)
def test_reordering_reaches_nearly_all_directions(operator, least):
    assert directions(operator) >= least


@pytest.mark.slow
def test_two_group_types_of_sharing_never_reach_many_directions():
    assert 0.55 <= directions(Share()) <= 0.65


def test_what_reorders_nothing_is_refused():
    with pytest.raises(InputError, match="share's draw 1 needs reorder"):
        Share(draw=1)
    with pytest.raises(InputError, match="rotate's seed lies in"):
        Rotate(reorder=True, seed=-1)
    assert Share(1, reorder=True, draw=2).authors_type(8, 24, 24) == 0
    assert Rotate(reorder=True, draw=2).authors_type(8, 24, 24) == 0


@pytest.mark.parametrize("group", [0, 1])
def test_every_row_of_m_is_used(group):
    dw = Share(group).matrix(jnp.arange(443.0 * 443).reshape(443, 443), 768, 768)
    assert len(np.unique(np.asarray(dw))) == 443**2


def test_a_restart_switches_the_group_type_of_both_sides():
    assert Share(0).switched() == Share(1)
    assert Share(1).switched() == Share(0)
    assert Share((0, 1)).switched() == Share((1, 0))


@pytest.mark.parametrize(("fields", "message"), [({"group": 2}, "group type"), ({"pad": "none"}, "pad is")])
def test_what_is_no_share_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        Share(**fields)


def test_the_four_pairs_come_in_the_order_of_the_authors_code():
    share, seen = Share(0, cycle=4), []
    for _ in range(5):
        seen.append(share.groups)
        share = share.switched()
    assert seen == [(0, 0), (1, 1), (1, 0), (0, 1), (0, 0)]


OTHERS = [
    Truncate(),
    *(
        o(pad, surplus)
        for o in (Decouple, Rotate)
        for pad in ("zero", "wrap")
        for surplus in ("fold", "drop")
    ),
]
# Square, wide, tall, odd widths, widths that r_hat does not divide, r_hat near and above a width.
SHAPES = [
    (24, 24, 8),
    (20, 33, 6),
    (33, 20, 6),
    (50, 30, 14),
    (9, 11, 8),
    (24, 23, 22),
    (8, 30, 10),
    (3, 9, 8),
]
QUICK_SHAPES = [(20, 33, 6), (24, 23, 22)]


def turned(x: np.ndarray, block: int) -> np.ndarray:
    """Eq. 9-11 by complex numbers: the pair (j, j + r/2) is one, turned by block * theta_j."""
    half = len(x) // 2
    theta = 10_000.0 ** (-2 * np.arange(half) / len(x))
    z = (x[:half] + 1j * x[half:]) * np.exp(1j * block * theta)
    return np.concatenate([z.real, z.imag])


def by_blocks(operator: Decouple, m: np.ndarray, x: np.ndarray, d: int) -> np.ndarray:
    """Equations 8 to 11 with loops."""
    r_hat = len(m)
    n_in, n_out = -(-len(x) // r_hat), -(-d // r_hat)
    padded = np.resize(x, n_in * r_hat)  # again and again from the front
    if operator.pad == "zero":
        padded[len(x) :] = 0
    blocks = padded.reshape(n_in, r_hat)
    if isinstance(operator, Rotate):
        blocks = np.stack([turned(block, i) for i, block in enumerate(blocks)])
    y = blocks @ m
    out = np.zeros((n_out, r_hat))
    for o in range(n_out):
        out[o] = y[o % n_in]
    for i in range(n_out, n_in):
        out[i % n_out] += y[i] if operator.surplus == "fold" else 0
    return out.reshape(-1)[:d]


def by_truncation(m: np.ndarray, x: np.ndarray, d: int) -> np.ndarray:
    """Equation 4."""
    r_hat = len(m)
    head, out = np.zeros(r_hat), np.zeros(max(d, r_hat))
    head[: min(len(x), r_hat)] = x[:r_hat]
    out[:r_hat] = head @ m
    return out[:d]


@pytest.mark.parametrize("operator", OTHERS, ids=str)
@pytest.mark.parametrize(("k", "d", "r_hat"), quick(QUICK_SHAPES, SHAPES))
def test_the_other_operators_are_their_definition(operator, k, d, r_hat):
    rng = np.random.default_rng(k + d)
    m, x = rng.normal(size=(r_hat, r_hat)).astype("f4"), rng.normal(size=(2, 3, k)).astype("f4")
    one = (lambda row: by_blocks(operator, m, row, d)) if isinstance(operator, Decouple) else None
    expected = np.stack([one(row) if one else by_truncation(m, row, d) for row in x.reshape(-1, k)])
    y, matrix = both_ways(operator, x, m, d)
    np.testing.assert_allclose(y, expected.reshape(2, 3, d), atol=1e-4)
    np.testing.assert_allclose(x @ np.asarray(matrix), expected.reshape(2, 3, d), atol=1e-4)


@pytest.mark.parametrize("operator", [*SHARES, *OTHERS, *REORDERED], ids=str)
@pytest.mark.parametrize(("k", "d", "r_hat"), quick(QUICK_SHAPES[:1], SHAPES))
def test_random_m_reaches_the_rank_that_is_promised(operator, k, d, r_hat):
    m = jax.random.normal(jax.random.key(k * d), (r_hat, r_hat))
    _, matrix = both_ways(operator, jnp.zeros((2, 3, k)), m, d)
    rank = np.linalg.matrix_rank(np.asarray(matrix, np.float64), tol=1e-4)
    assert rank == operator.rank_bound(r_hat, k, d)


@pytest.mark.parametrize("operator", [Decouple(), Rotate()], ids=str)
def test_every_input_counts_when_there_are_fewer_outputs(operator):
    m = jax.random.normal(jax.random.key(0), (6, 6))
    assert (np.abs(operator.matrix(m, 33, 20)).max(axis=1) > 0).all()
    dropping = dataclasses.replace(operator, surplus="drop")
    ignored = np.abs(dropping.matrix(m, 33, 20)).max(axis=1) == 0
    assert ignored.tolist() == [False] * 24 + [True] * 9


@pytest.mark.parametrize("operator", [*SHARES, *OTHERS, *REORDERED], ids=str)
def test_no_operator_compiles_to_a_gather(operator):
    def both(x, m):
        return operator.decompress(operator.compress(x, 6, 33) @ m, 33), operator.matrix(m, 20, 33)

    text = jax.jit(both).lower(jnp.ones((2, 20)), jnp.ones((6, 6))).as_text()
    assert "gather" not in text


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(shapes, st.sampled_from([*SHARES, *OTHERS, *REORDERED]), st.integers(0, 2**31))
def test_matrix_is_what_the_two_directions_do_for_any_shape(shape, operator, seed):
    k, d, r_hat = shape
    r_hat += r_hat % operator.multiple
    rng = np.random.default_rng(seed)
    m, x = rng.normal(size=(r_hat, r_hat)).astype("f4"), rng.normal(size=(2, k)).astype("f4")
    y, matrix = both_ways(operator, x, m, d)
    np.testing.assert_allclose(y, x @ np.asarray(matrix), atol=1e-4)


GOLDEN = {
    "mora_type1": Share(0, "wrap"),
    "mora_type2": Share(1, "wrap"),
    "mora_type4": Share((0, 1), "wrap"),
    "mora_type6": Rotate("wrap", "drop"),
    "decouple": Decouple("wrap", "drop"),
}


@pytest.mark.parametrize("kind", quick(["mora_type1", "mora_type6"], GOLDEN))
def test_operators_match_the_authors_code(kind, golden):
    files = sorted(golden.glob(f"{kind}_*.npz"))
    assert len(files) >= 5
    for file in files:
        data = np.load(file)
        k, d, r_hat = int(data["k"]), int(data["d"]), int(data["rhat"])
        m = jnp.array(data["M"].T)  # recorded as out = in @ M.T
        operator = GOLDEN[kind]
        assert data["x"].shape[-1] == k
        assert len(m) == r_hat
        delta, matrix = both_ways(operator, data["x"], m, d)
        np.testing.assert_allclose(delta, data["delta_out"], atol=1e-5, err_msg=file.name)
        for name in {"fwd_operator", "delta_weight"} & set(data.files):
            np.testing.assert_allclose(matrix.T, data[name], atol=1e-5, err_msg=file.name)
