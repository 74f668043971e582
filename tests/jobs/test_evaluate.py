"""The validation loss is the mean over every prediction of the split, and over nothing else."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from mora_jax import sharding
from mora_jax.errors import InputError
from mora_jax.models.llama import Compute, Llama
from mora_jax.transform import Methods
from train.config.sections import Evaluation
from train.data.rows.info import load_info
from train.data.rows.read import eval_batches
from train.jobs.evaluate import Score, check_divides, check_vocabulary, evaluate
from train.run.model import load_model


@pytest.fixture(scope="module")
def model(tiny_run):
    params, config = load_model(str(tiny_run.folder))
    return Llama(config, Compute(dtype="float32", layers="scan")), params


@pytest.fixture
def info(tiny_run):
    return load_info(tiny_run.config.data.directory)


def rows(info, count: int) -> np.ndarray:
    import tensorflow_datasets as tfds

    source = tfds.builder_from_directory(info.directory).as_data_source("validation")
    return np.stack([source[i]["tokens"] for i in range(count)]).astype(np.int32)


def expected(model, tokens_BT: np.ndarray) -> float:
    """Written without the code under test: the mean of -log p of every next token."""
    module, params = model
    logits_BTV = np.asarray(module.apply({"params": params}, tokens_BT), np.float64)
    logits_BTV -= logits_BTV.max(-1, keepdims=True)
    log_p_BTV = logits_BTV - np.log(np.exp(logits_BTV).sum(-1, keepdims=True))
    picked_BT = np.take_along_axis(log_p_BTV[:, :-1], tokens_BT[:, 1:, None], axis=-1)
    return float(-picked_BT.mean())


def test_the_full_split_with_a_partial_last_batch(model, info):
    count = info.rows["validation"]
    batch = next(size for size in (60, 70, 80) if count % size and count > size)
    score = evaluate(*split(model), info, Evaluation(batch_size=batch), sharding.make_mesh(1))
    assert score.predictions == count * 31
    np.testing.assert_allclose(score.loss, expected(model, rows(info, count)), rtol=1e-5)


@pytest.mark.slow
def test_the_first_batches_only(model, info):
    how = Evaluation(batch_size=4, max_batches=3)
    score = evaluate(*split(model), info, how, sharding.make_mesh(1))
    assert score.predictions == 12 * 31
    np.testing.assert_allclose(score.loss, expected(model, rows(info, 12)), rtol=1e-5)


def test_the_score_does_not_depend_on_the_devices(model, info):
    how = Evaluation(batch_size=4, max_batches=3)
    module, methods, params, adapters = split(model)
    one, four = (
        evaluate(
            module, methods, jax.device_put(params, sharding.replicated(mesh)), adapters, info, how, mesh
        )
        for mesh in (sharding.make_mesh(1), sharding.make_mesh(4))
    )
    np.testing.assert_allclose(one.loss, four.loss, rtol=1e-6)


def split(model):
    module, params = model
    return module, Methods(()), params, {}


def test_perplexity_is_the_exponential_of_the_loss_and_never_overflows():
    assert Score(2.0, 1).perplexity == math.exp(2.0)
    assert math.isfinite(Score(1e6, 1).perplexity)


def test_a_larger_vocabulary_than_the_models_is_refused(model, info):
    check_vocabulary(info, info.vocab_size)
    with pytest.raises(InputError, match=r"384 tokens, more than model\.vocab_size 383"):
        check_vocabulary(info, 383)
    larger = dataclasses.replace(info, vocab_size=385)
    with pytest.raises(InputError, match=r"more than model\.vocab_size"):
        evaluate(*split(model), larger, Evaluation(batch_size=4), sharding.make_mesh(1))


def test_a_batch_that_does_not_divide_is_refused(model, info):
    mesh = sharding.make_mesh(4)
    check_divides("eval.batch_size", 8, mesh)
    with pytest.raises(InputError, match=r"eval\.batch_size 6 does not divide among 4 devices"):
        evaluate(*split(model), info, Evaluation(batch_size=6), mesh)


def test_all_devices_are_used():
    assert sharding.make_mesh(-1).devices.size == jax.device_count()


@pytest.mark.slow
def test_a_batch_is_never_wider_than_the_split(model, info, monkeypatch):
    seen = []

    def noted(info, split, batch_size, *rest):
        seen.append(batch_size)
        return eval_batches(info, split, batch_size, *rest)

    monkeypatch.setattr("train.jobs.evaluate.eval_batches", noted)
    net, params = model
    mesh = sharding.make_mesh(1)
    small, large = (
        evaluate(net, Methods(()), params, {}, info, Evaluation(batch_size=size), mesh) for size in (8, 2**20)
    )
    assert seen[0] == 8
    assert seen[1] == info.rows["validation"]
    assert large.predictions == small.predictions
    np.testing.assert_allclose(large.loss, small.loss, rtol=1e-6)
