"""MoRA's operators against their definition by index, against each other and against recorded numbers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mora_jax.errors import InputError
from mora_jax.methods.operators import Share

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
            dw[j] += m[(k + j) % r_hat][columns]
    return dw


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
    np.testing.assert_allclose(share.matrix(jnp.array(m), k, d), dw, rtol=1e-6)
    y = share.decompress(share.compress(jnp.array(x), r_hat) @ m, d)
    np.testing.assert_allclose(y, x @ dw, atol=1e-4)


@pytest.mark.parametrize("group", [0, 1])
def test_every_row_of_m_is_used(group):
    dw = Share(group).matrix(jnp.arange(443.0 * 443).reshape(443, 443), 768, 768)
    assert len(np.unique(np.asarray(dw))) == 443**2


def test_a_restart_switches_the_group_type_of_both_sides():
    assert Share(0).switched() == Share(1)
    assert Share(1).switched() == Share(0)
    assert Share((0, 1)).switched() == Share((1, 0))


def test_sharing_compiles_without_a_gather():
    text = jax.jit(lambda x: Share(1).decompress(Share(0).compress(x, 5), 17)).lower(jnp.ones((2, 13))).as_text()
    assert "gather" not in text


@pytest.mark.parametrize(("fields", "message"), [({"group": 2}, "group type"), ({"pad": "none"}, "pad is")])
def test_what_is_no_share_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        Share(**fields)


GOLDEN = {1: Share(0, "wrap"), 2: Share(1, "wrap"), 4: Share((0, 1), "wrap")}


@pytest.mark.parametrize("mora_type", GOLDEN)
def test_share_matches_the_authors_code(mora_type, golden):
    files = sorted(golden.glob(f"mora_type{mora_type}_*.npz"))
    assert files
    for file in files:
        data = np.load(file)
        k, d, r_hat = int(data["k"]), int(data["d"]), int(data["rhat"])
        m = jnp.array(data["M"].T)  # recorded as out = in @ M.T
        share = GOLDEN[mora_type]
        delta = share.decompress(share.compress(jnp.array(data["x"]), r_hat) @ m, d)
        np.testing.assert_allclose(delta, data["delta_out"], atol=1e-5, err_msg=file.name)
        np.testing.assert_allclose(share.matrix(m, k, d).T, data["fwd_operator"], atol=1e-5, err_msg=file.name)
