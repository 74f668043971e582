"""The splash kernel, interpreted on the CPU, against XLA's attention, and both against a mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from slow import slow

from mora_jax import sharding
from mora_jax.errors import InputError
from mora_jax.models.attention import Visible, attention
from mora_jax.models.llama import Compute


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    """The kernel's own program, run step by step where there is no TPU."""
    make = functools.partial(splash_attention.make_splash_mha, interpret=True)
    monkeypatch.setattr(splash_attention, "make_splash_mha", make)


def heads(count: int, width: int, rows: int = 2, length: int = 128, seed: int = 0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), (rows, length, count, width), dtype)


def results(kernel, q, k, v, w, visible=Visible()):  # noqa: B008 (immutable)
    """What comes out, and the gradients for q, k and v of its product with w."""

    def loss(q, k, v):
        y = attention(q, k, v, visible, kernel)
        return (y.astype(jnp.float32) * w).sum(), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    return y, *gradients


@pytest.mark.parametrize(
    ("kv_heads", "width"),
    [slow(4, 48), (2, 64), slow(1, 16)],
)
def test_equals_xla(kv_heads, width):
    q, k, v, w = (heads(n, width, seed=i) for i, n in enumerate((4, kv_heads, kv_heads, 4)))
    for ours, theirs in zip(results("splash", q, k, v, w), results("xla", q, k, v, w), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.slow
def test_several_blocks():
    q, k, v, w = (heads(2, 16, rows=1, length=384, seed=i) for i in range(4))
    for ours, theirs in zip(results("splash", q, k, v, w), results("xla", q, k, v, w), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_no_place_sees_those_after_it():
    q, k, v = (heads(2, 16, seed=i) for i in range(3))
    changed = v.at[:, 100:].add(1.0)
    before, after = (attention(q, k, each, kernel="splash") for each in (v, changed))
    np.testing.assert_array_equal(before[:, :100], after[:, :100])
    assert jnp.abs(after[:, 100:] - before[:, 100:]).min() > 0


@pytest.mark.parametrize("window", [slow(1), 100, slow(256)])
@pytest.mark.parametrize("kernel", ["xla", "splash"])
def test_a_window_is_a_mask(kernel, window):
    """A position attends to itself and to the window - 1 before it; 256 keys in two blocks."""
    q, k, v = (heads(2, 16, rows=1, length=256, seed=i) for i in range(3))
    at = jnp.arange(256)
    mask = (at[None, :] <= at[:, None]) & (at[None, :] > at[:, None] - window)
    expected = jax.nn.dot_product_attention(q, k, v, mask=mask[None, None])
    y = attention(q, k, v, Visible(window), kernel)
    np.testing.assert_allclose(y, expected, atol=2e-5)


@pytest.mark.slow
def test_gradients_of_a_window():
    q, k, v, w = (heads(n, 16, rows=1, length=256, seed=i) for i, n in enumerate((4, 2, 2, 4)))
    both = (results(kernel, q, k, v, w, Visible(100)) for kernel in ("splash", "xla"))
    for ours, theirs in zip(*both, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_a_window_that_reaches_over_the_sequence_adds_nothing_to_the_program():
    q = heads(2, 16, rows=1)

    def program(window):
        return str(jax.make_jaxpr(lambda q: attention(q, q, q, Visible(window)))(q))

    assert program(128) == program(0) != program(127)


@pytest.mark.slow
def test_bfloat16_is_near():
    q, k, v, w = (heads(2, 64, seed=i, dtype=jnp.bfloat16) for i in range(4))
    y, exact = (
        results("splash", q, k, v, w)[0],
        results("xla", *(x.astype(jnp.float32) for x in (q, k, v, w)))[0],
    )
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(np.float32), exact, atol=0.03)


@pytest.mark.slow
def test_each_device_computes_its_own_rows_and_heads():
    q, k, v, w = (heads(4, 16, rows=4, seed=i) for i in range(4))
    alone = results("splash", q, k, v, w)
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2)
    place = NamedSharding(mesh, P("fsdp", None, "tensor"))
    with jax.set_mesh(mesh):
        divided = results("splash", *(jax.device_put(x, place) for x in (q, k, v, w)))
    for ours, theirs in zip(divided, alone, strict=True):
        assert ours.sharding.is_equivalent_to(place, ours.ndim)
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_lengths_that_no_block_divides_are_refused():
    with pytest.raises(InputError, match="a multiple of 128 tokens, not 100; use xla"):
        attention(*(heads(2, 16, length=100) for _ in range(3)), kernel="splash")


def test_the_model_takes_it():
    assert Compute(attention="splash", dtype="float32").attention == "splash"
