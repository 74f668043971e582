"""The count of products in traced programs."""

import jax
import jax.numpy as jnp
import pytest

from mora_jax.models.attention import Visible, attention
from train.perf.plan.flops import product_flops


def flops(function, *shapes: tuple[int, ...]) -> int:
    return product_flops(
        jax.jit(function).trace(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).jaxpr
    )


def test_a_product():
    assert flops(lambda a, b: a @ b, (3, 5), (5, 7)) == 2 * 3 * 5 * 7


def test_a_batched_product_over_two_axes():
    assert (
        flops(lambda a, b: jnp.einsum("bijk,bjkl->bil", a, b), (2, 3, 4, 5), (2, 4, 5, 7))
        == 2 * 2 * 3 * 20 * 7
    )


def test_a_loop_counts_every_iteration():
    def repeated(x, w):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    assert flops(repeated, (3, 5), (11, 5, 5)) == 11 * 2 * 3 * 5 * 5


def test_an_unused_product_does_not_count():
    def wasteful(a, b):
        both = jax.jit(lambda a, b: (a @ b, a + a))(a, b)
        return both[1]

    assert flops(wasteful, (5, 5), (5, 5)) == 0


def test_the_larger_branch_counts():
    def either(a, b):
        return jax.lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: a @ b @ b)

    assert flops(either, (5, 5), (5, 5)) == 2 * 2 * 5**3


def test_a_gradient_with_rematerialisation():
    """Two products forward, both recomputed, and three backward: x needs no gradient."""

    def loss(w, x):
        return jax.checkpoint(lambda w: jnp.tanh(jnp.tanh(x @ w) @ w).sum())(w)

    assert flops(jax.value_and_grad(loss), (5, 5), (3, 5)) == 2 * 3 * 25 * (2 + 2 + 3)


def test_agrees_with_the_compiler_where_there_is_no_loop():
    def loss(w, x):
        return jax.nn.silu(x @ w[0]) @ w[1] @ x.T

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 128, 128), (64, 128))]
    traced = jax.jit(jax.grad(lambda w, x: loss(w, x).sum())).trace(*shapes)
    compiler = traced.lower().compile().cost_analysis()["flops"]  # also counts other operations
    assert 0.95 * compiler < product_flops(traced.jaxpr) < compiler


@pytest.mark.parametrize(("window", "share"), [(0, 1), (128, 2 / 3)])
def test_the_kernel_of_attention_counts_every_block_of_its_grid(window, share):
    """Of three blocks of keys a window of one block sees two; the batch is a part of the grid."""

    def attend(x_BTNH):
        return attention(x_BTNH, x_BTNH, x_BTNH, Visible(window), "splash")

    assert flops(attend, (3, 384, 2, 128)) == share * 3 * 2 * (4 * 384 * 384 * 128)
