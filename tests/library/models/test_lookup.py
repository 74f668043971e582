"""Rows of the embedding, and the gradient of their table on meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slow import slow

from mora_jax import sharding
from mora_jax.models.lookup import TABLE, lookup

V, D = 24, 8


@pytest.fixture
def inputs():
    keys = jax.random.split(jax.random.key(0), 3)
    # Some tokens come often, so that their rows are sums, and some never.
    tokens_BT = jax.random.randint(keys[1], (8, 6), 0, V // 2)
    return jax.random.normal(keys[0], (V, D)), tokens_BT, jax.random.normal(keys[2], (8, 6, D))


def gradient(table_VD, tokens_BT, dx_BTD, *how):
    return jax.vjp(lambda table: lookup(table, tokens_BT, *how), table_VD)[1](dx_BTD)[0]


def test_rows_and_gradient_are_those_of_a_plain_lookup(inputs):
    table_VD, tokens_BT, dx_BTD = inputs
    x_BTD, vjp = jax.vjp(lambda table: table[tokens_BT], table_VD)
    np.testing.assert_array_equal(lookup(table_VD, tokens_BT), x_BTD)
    np.testing.assert_allclose(gradient(*inputs), vjp(dx_BTD)[0], rtol=1e-6)
    assert lookup(table_VD, tokens_BT, TABLE, jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize("shape", [slow((8, 1, 1)), slow((1, 8, 1)), (2, 2, 2)], ids=str)
def test_a_mesh_sums_the_gradient_of_its_parts_in_either_type(inputs, shape):
    expected, mesh = gradient(*inputs), sharding.make_mesh(*shape)
    table_VD, tokens_BT, dx_BTD = inputs
    with jax.set_mesh(mesh):
        place = jax.NamedSharding(mesh, sharding.spec(TABLE, table_VD.shape, mesh.shape))
        placed = jax.device_put(table_VD, place), *jax.device_put((tokens_BT, dx_BTD), sharding.batch(mesh))
        compiled = jax.jit(gradient, static_argnums=(3, 4, 5))
        exact, rounded = (compiled(*placed, TABLE, jnp.float32, sums) for sums in (jnp.float32, jnp.bfloat16))
    assert exact.sharding.is_equivalent_to(place, 2)
    assert exact.dtype == rounded.dtype == jnp.float32
    np.testing.assert_allclose(exact, expected, rtol=1e-5, atol=1e-6)
    error = np.linalg.norm(rounded - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 1e-2
