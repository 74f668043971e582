"""Packed rows compute what their sequences compute alone: loss, gradients, positions, every kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import CONFIGS, random_params
from jax.experimental.pallas.ops.tpu import splash_attention
from slow import slow

from mora_jax import trees
from mora_jax.models import cudnn
from mora_jax.models.batch import Batch
from mora_jax.models.llama import Compute, Llama

LENGTH = 128
# Lengths of the sequences of two rows; what is left of a row is padding.
ROWS = ((40, 3, 60), (1, 90))


def packed(vocab_size: int) -> Batch:
    """Random sequences in rows, with random weights, some of them 0."""
    rng = np.random.default_rng(0)
    tokens_BT = rng.integers(1, vocab_size, (len(ROWS), LENGTH))
    weights_BT = rng.uniform(0.1, 1.0, tokens_BT.shape) * (rng.uniform(size=tokens_BT.shape) < 0.7)
    segments_BT = np.zeros(tokens_BT.shape, np.int32)
    for row_T, lengths in zip(segments_BT, ROWS, strict=True):
        ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        row_T[: len(ids)] = ids
    return Batch(
        jnp.asarray(tokens_BT, jnp.int32), jnp.asarray(weights_BT, jnp.float32), jnp.asarray(segments_BT)
    )


def alone(batch: Batch) -> Batch:
    """Each sequence in a row of its own, before zeros of weight 0."""
    tokens_NT, weights_NT = [], []
    for b, lengths in enumerate(ROWS):
        for length, start in zip(lengths, np.cumsum([0, *lengths]), strict=False):
            here, padding = np.s_[start : start + length], (0, LENGTH - length)
            tokens_NT.append(np.pad(batch.tokens_BT[b, here], padding))
            weights_NT.append(np.pad(batch.weights_BT[b, here], padding))
    return Batch(jnp.asarray(tokens_NT), jnp.asarray(weights_NT))


def total_and_gradient(model, params, batch):
    """The sum of losses, that of weights, and the gradient of the former."""

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def losses(params):
        return model.apply({"params": params}, batch, method="loss")

    (total, count), gradients = losses(params)
    return float(total), float(count), trees.flatten(gradients)


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("llama", "xla"),
        slow("llama", "splash"),
        slow("qwen3, biases, window", "xla"),
        slow("qwen3, biases, window", "splash"),
        slow("llama, llama3", "xla"),
    ],
)
def test_packed_rows_are_their_sequences(name, kernel, monkeypatch):
    make = functools.partial(splash_attention.make_splash_mha, interpret=True)
    monkeypatch.setattr(splash_attention, "make_splash_mha", make)
    config, params = CONFIGS[name], random_params(CONFIGS[name])
    batch = packed(config.vocab_size)
    model = Llama(config, Compute(dtype="float32", attention=kernel, layers="scan", loss_chunk=64))
    total, count, gradients = total_and_gradient(model, params, batch)
    plain = Llama(config, Compute(dtype="float32", layers="scan", loss_chunk=64))
    total_, count_, gradients_ = total_and_gradient(plain, params, alone(batch))
    np.testing.assert_allclose([total, count], [total_, count_], rtol=1e-5)
    for path, expected in gradients_.items():
        largest = np.abs(expected).max()
        np.testing.assert_allclose(gradients[path], expected, atol=1e-5 * largest, err_msg=path)


def test_what_counts():
    batch = Batch(
        jnp.zeros((1, 6), jnp.int32),
        jnp.array([[9.0, 1.0, 0.5, 9.0, 1.0, 9.0]]),
        jnp.array([[1, 1, 1, 2, 2, 0]]),
    )
    assert batch.target_weights().tolist() == [[1.0, 0.5, 0.0, 1.0, 0.0, 0.0]]
    assert batch.positions().tolist() == [[0, 1, 2, 0, 1, 0]]
    assert Batch(batch.tokens_BT).target_weights().tolist() == [[1.0] * 5 + [0.0]]


@pytest.mark.slow
def test_given_positions_are_taken():
    config, params = CONFIGS["llama"], random_params(CONFIGS["llama"])
    model = Llama(config, Compute(dtype="float32", layers="scan"))
    batch = packed(config.vocab_size)
    given = Batch(batch.tokens_BT, batch.weights_BT, batch.segments_BT, batch.positions())
    shifted = Batch(batch.tokens_BT, batch.weights_BT, batch.segments_BT, batch.positions() * 3)
    loss = jax.jit(functools.partial(model.apply, {"params": params}, method="loss"))
    by_default, same, other = (float(loss(each)[0]) for each in (batch, given, shifted))
    assert same == by_default
    assert abs(other - by_default) > 1e-3 * by_default


@pytest.mark.slow
@pytest.mark.parametrize("most", [4, 7])
def test_ranges_of_segments(most):
    segments_BT = packed(9).segments_BT
    lengths_BM, starts_BM = cudnn.ranges(segments_BT, most)
    for b, lengths in enumerate(ROWS):
        padding = LENGTH - sum(lengths)
        expected = [*lengths, padding]
        assert lengths_BM[b].tolist() == expected + [-1] * (most - len(expected))
        starts = np.cumsum([0, *lengths]).tolist()
        assert starts_BM[b].tolist() == starts + [-1] * (most + 1 - len(starts))


def test_the_packed_layout_is_for_long_rows_of_few_segments_on_a_gpu(monkeypatch):
    class Hopper:
        platform, compute_capability = "gpu", "9.0"

    assert not cudnn.pays(2048, 16)
    monkeypatch.setattr(jax, "local_devices", lambda: [Hopper])
    assert cudnn.pays(2048, 32)
    assert not cudnn.pays(2048, 33)
    assert not cudnn.pays(2048, 0)
    assert not cudnn.pays(512, 4)
    Hopper.compute_capability = "8.0"
    assert not cudnn.pays(2048, 16)
