"""Log-likelihoods of given tokens: those of full logits, whatever the batches, chunks and devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_folders import CONFIG, random_params
from slow import quick

from mora_jax import sharding
from mora_jax.errors import InputError
from mora_jax.models.llama import LAYOUTS, Compute, Llama
from mora_jax.models.loss import target_scores
from mora_jax.models.score import Row, score

MODEL = Llama(CONFIG, Compute("float32", layers="scan", loss_chunk=8))
# Weights of the embedding's size make few tokens likely: some targets must be the likeliest.
PARAMS = jax.tree.map(lambda a: a * 0.5, random_params(CONFIG))


def rows_of(*lengths: int) -> list[Row]:
    rng = np.random.default_rng(1)
    rows = []
    for length in lengths:
        tokens = rng.integers(0, CONFIG.vocab_size, length)
        at = np.sort(rng.choice(length, 1 + length // 3, replace=False))
        rows.append(Row(tokens, at, rng.integers(0, CONFIG.vocab_size, len(at))))
    return rows


def greedy(rows: list[Row]) -> list[Row]:
    """The rows, every second target replaced by the likeliest token."""
    found = []
    for row in rows:
        likeliest = np.asarray(logits(row).argmax(-1))[row.at]
        found.append(row._replace(targets=np.where(np.arange(len(row.at)) % 2, row.targets, likeliest)))
    return found


@jax.jit
def padded_logits(tokens_BT: jax.Array) -> jax.Array:
    return MODEL.apply({"params": PARAMS}, tokens_BT)


def logits(row: Row) -> jax.Array:
    padded = np.pad(row.tokens, (0, 64 - len(row.tokens)))
    return padded_logits(padded[None])[0, : len(row.tokens)]


@pytest.mark.parametrize("devices", quick([4], [1, 4]))
def test_scores_are_those_of_the_full_logits(devices):
    rows, done = greedy(rows_of(3, 40, 64, 33, 1)), []
    mesh = sharding.make_mesh(1, devices)
    params = jax.device_put(PARAMS, sharding.shardings(PARAMS, mesh, LAYOUTS))
    with jax.set_mesh(mesh):
        found = score(MODEL, params, rows, 2, done.append)
    assert sum(done) == 5
    for row, scores in zip(rows, found, strict=True):
        expected = jax.nn.log_softmax(logits(row))[row.at, row.targets]
        np.testing.assert_allclose(scores.log_p_Q, expected, atol=2e-5)
        np.testing.assert_array_equal(scores.greedy_Q, logits(row).argmax(-1)[row.at] == row.targets)
    assert {bool(x) for scores in found for x in scores.greedy_Q} == {True, False}


def test_few_shapes_are_compiled(monkeypatch):
    from mora_jax.models import score as module

    shapes = set()

    def seen(model, params, tokens_BT, at_BQ, targets_BQ):
        shapes.add((tokens_BT.shape, at_BQ.shape))
        return np.zeros(at_BQ.shape), np.zeros(at_BQ.shape, bool)

    monkeypatch.setattr(module, "score_batch", seen)
    rows = [Row(row.tokens, row.at[:1], row.targets[:1]) for row in rows_of(*range(1, 65))]
    score(MODEL, PARAMS, rows, 3)
    assert shapes == {((4, n), (4, 1)) for n in (16, 24, 32, 48, 64)}
    short = dataclasses.replace(CONFIG, max_position_embeddings=60)
    shapes.clear()
    score(Llama(short), PARAMS, rows_of(60), 1)
    assert [shape for shape, _ in shapes] == [(1, 60)]  # no longer than the context


def test_a_chunk_that_does_not_divide_is_refused():
    with pytest.raises(InputError, match="a loss chunk of 3 tokens does not divide the 4 tokens"):
        target_scores(jnp.ones((4, 2)), jnp.ones((2, 5)), jnp.zeros(4, jnp.int32), 3)
