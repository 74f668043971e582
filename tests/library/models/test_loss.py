"""The chunked loss against the plain formula."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slow import quick

from mora_jax import sharding
from mora_jax.errors import InputError
from mora_jax.models.loss import cross_entropy

T, D, V = 24, 8, 19


@pytest.fixture
def inputs():
    keys = jax.random.split(jax.random.key(0), 4)
    x_TD, w_DV = jax.random.normal(keys[0], (T, D)), jax.random.normal(keys[1], (D, V))
    targets_T = jax.random.randint(keys[2], (T,), 0, V)
    weights_T = jax.random.bernoulli(keys[3], 0.7, (T,)).astype(jnp.float32)
    return x_TD, w_DV, targets_T, weights_T


def plain(x_TD, w_DV, targets_T, weights_T):
    logp_TV = jax.nn.log_softmax(x_TD @ w_DV)
    return -jnp.sum(logp_TV[jnp.arange(T), targets_T] * weights_T)


@pytest.mark.parametrize("chunk", quick([6], [1, 6, 24]))
def test_loss_and_gradients_are_those_of_the_plain_formula(inputs, chunk):
    expected, (dx, dw) = jax.value_and_grad(lambda *a: 3 * plain(*a), argnums=(0, 1))(*inputs)
    got, (dx_, dw_) = jax.value_and_grad(lambda *a: 3 * cross_entropy(*a, chunk), argnums=(0, 1))(*inputs)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    np.testing.assert_allclose(3 * cross_entropy(*inputs, chunk), expected, rtol=1e-6)
    np.testing.assert_allclose(dx_, dx, atol=1e-5)
    np.testing.assert_allclose(dw_, dw, atol=1e-5)


def test_full_logits_are_never_held(inputs):
    text = str(jax.make_jaxpr(jax.grad(lambda *a: cross_entropy(*a, 6), argnums=(0, 1)))(*inputs))
    assert "f32[6,128]" in text
    for width in (V, 128):
        assert f"[{T},{width}]" not in text
        assert f"[4,6,{width}]" not in text


@pytest.mark.slow
def test_bfloat16_states_give_the_loss_of_float32_logits_and_gradients_within_their_rounding(inputs):
    x_TD, w_DV, *rest = inputs
    x_TD, w_DV = x_TD.astype(jnp.bfloat16), w_DV.astype(jnp.bfloat16).astype(jnp.float32)
    loss = cross_entropy(x_TD, w_DV, *rest, 6)
    assert loss.dtype == jnp.float32
    exact = x_TD.astype(jnp.float32), w_DV, *rest
    np.testing.assert_allclose(loss, plain(*exact), rtol=1e-6)
    got = jax.grad(cross_entropy, argnums=(0, 1))(x_TD, w_DV, *rest, 6)
    for g, e in zip(got, jax.grad(plain, argnums=(0, 1))(*exact), strict=True):
        assert np.linalg.norm(g.astype(jnp.float32) - e) < 5e-3 * np.linalg.norm(e)


def test_logits_are_held_in_the_type_of_the_products_where_there_are_gradients(inputs):
    x_TD, *rest = inputs

    def products(function):
        text = str(jax.make_jaxpr(lambda x: function(x, *rest, 6))(x_TD.astype(jnp.bfloat16)))
        return re.findall(r"(\w+)\[6,128\] = dot_general", text)

    assert products(cross_entropy) == ["f32"]
    assert products(jax.grad(cross_entropy)) == ["bf16"]


@pytest.mark.slow
def test_the_gradient_of_a_target_that_is_all_but_certain_is_not_lost_to_rounding():
    """softmax - 1 is small beside both, which bfloat16 holds to 3 digits."""
    x_TD, w_DV = jnp.ones((1, 1)), jnp.zeros((1, V)).at[0, 3].set(8.0)
    args = jnp.array([3]), jnp.ones(1), 1
    dw_DV = jax.grad(cross_entropy, argnums=1)(x_TD.astype(jnp.bfloat16), w_DV, *args)
    np.testing.assert_allclose(dw_DV, jax.nn.softmax(w_DV) - jax.nn.one_hot(jnp.array([3]), V), rtol=1e-2)


def test_a_chunk_that_does_not_divide_is_refused(inputs):
    with pytest.raises(InputError, match="chunk of 7 tokens does not divide the 24"):
        cross_entropy(*inputs, 7)


def test_devices_share_every_chunk(inputs):
    """A batch divided over devices stays so: no device gathers the states of the others."""
    mesh = sharding.make_mesh(4)
    x_TD, w_DV, targets_T, weights_T = inputs
    args = jax.device_put((x_TD, targets_T, weights_T), sharding.batch(mesh))
    gradient = jax.grad(lambda x, t, g, w: cross_entropy(x, w, t, g, 12), argnums=(0, 3))
    text = jax.jit(gradient).lower(*args, jax.device_put(w_DV, sharding.replicated(mesh))).compile().as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text
    assert "all-to-all" not in text
