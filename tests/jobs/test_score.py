"""A run, its export and the run's own summary agree on the score."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from mora_jax.errors import InputError
from train.data.rows.build import prepare
from train.data.tokenizer import train_tokenizer
from train.jobs.evaluate import evaluate
from train.jobs.export import export
from train.jobs.pretrain import pretrain
from train.jobs.score import score_path


@pytest.fixture(scope="module")
def exported(tiny_run, tmp_path_factory) -> str:
    out = str(tmp_path_factory.mktemp("scoring") / "export")
    export(str(tiny_run.folder), out)
    return out


@pytest.mark.slow  # tests/cli/test_main.py compares them as the command prints them
def test_a_run_its_export_and_its_summary_agree(tiny_run, exported):
    how = tiny_run.config.eval
    data = tiny_run.config.data.directory
    run = score_path(str(tiny_run.folder), "", how, "float32")
    export = score_path(exported, data, how, "float32")
    assert run == export
    # The run computes W + dW and the merged model holds it, both in float32.
    np.testing.assert_allclose(run.loss, tiny_run.summary["validation_loss"], rtol=1e-5)


@pytest.mark.slow
def test_bfloat16_gives_nearly_the_same_score(tiny_run, exported):
    how = dataclasses.replace(tiny_run.config.eval, max_batches=1)
    data = tiny_run.config.data.directory
    exact, rounded = (score_path(exported, data, how, dtype) for dtype in ("float32", "bfloat16"))
    assert rounded.loss != exact.loss
    np.testing.assert_allclose(rounded.loss, exact.loss, rtol=2e-3)


@pytest.mark.slow
def test_weights_in_bfloat16_are_held_so_for_its_products(tiny_run, tmp_path, monkeypatch):
    export(str(tiny_run.folder), str(tmp_path / "out"), "bfloat16")
    how, seen = dataclasses.replace(tiny_run.config.eval, max_batches=1), []

    def noted(model, methods, params, *rest):
        seen.append({leaf.dtype.name for leaf in jax.tree.leaves(params)})
        return evaluate(model, methods, params, *rest)

    def score():
        return score_path(str(tmp_path / "out"), tiny_run.config.data.directory, how, "bfloat16").loss

    monkeypatch.setattr("train.jobs.score.evaluate", noted)
    held = score()
    monkeypatch.setattr("mora_jax.hf.stored_types", lambda _: None)
    assert score() == held
    assert seen == [{"bfloat16"}, {"float32"}]


@pytest.mark.slow
def test_a_model_is_sharded_over_all_devices(tiny_run, monkeypatch):
    seen = []

    def noted(model, methods, params, *rest):
        seen.append(params["layers"]["mlp"]["up_proj"]["kernel"].sharding.shard_shape((2, 32, 48)))
        return evaluate(model, methods, params, *rest)

    monkeypatch.setattr("train.jobs.score.evaluate", noted)
    how = dataclasses.replace(tiny_run.config.eval, batch_size=8, max_batches=1)
    score_path(str(tiny_run.folder), "", how, "float32")
    assert seen == [(2, 4, 48)]


@pytest.mark.slow
def test_a_batch_that_devices_do_not_divide_runs_on_one(tiny_run):
    how = dataclasses.replace(tiny_run.config.eval, batch_size=3, max_batches=1)
    assert score_path(str(tiny_run.folder), "", how, "float32").predictions == 3 * 31


def test_an_export_needs_a_data_set(tiny_run, exported):
    with pytest.raises(InputError, match="for a Hugging Face folder, --data must name a data set"):
        score_path(exported, "", tiny_run.config.eval, "float32")


def test_missing_folders_are_named(tiny_run, tmp_path):
    how, data = tiny_run.config.eval, tiny_run.config.data.directory
    with pytest.raises(InputError, match=r"nowhere is missing"):
        score_path(str(tmp_path / "nowhere"), data, how, "float32")
    with pytest.raises(InputError, match="nowhere is not a data set"):
        score_path(str(tiny_run.folder), str(tmp_path / "nowhere"), how, "float32")


def test_weights_that_are_no_model_have_no_score(tiny_run, exported, tmp_path):
    folder = tmp_path / "nan"
    shutil.copytree(exported, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + np.float32(np.nan).tobytes())
    with pytest.raises(InputError, match=r"nan: the loss on .* is nan, so its weights are no model"):
        score_path(str(folder), tiny_run.config.data.directory, tiny_run.config.eval, "float32")


@pytest.mark.slow
def test_an_export_is_not_scored_on_text_of_another_tokenizer(tiny_run, exported, tmp_path, tiny_text):
    """Of as many pieces."""
    train_tokenizer(str(tiny_text / "c4-validation.*"), str(tmp_path / "other.model"), 384)
    source, validation = (str(tiny_text / f"c4-{split}.*") for split in ("train", "validation"))
    prepare(source, validation, str(tmp_path / "other.model"), 32, str(tmp_path / "data"), workers=1)
    for model in (exported, str(tiny_run.folder)):
        with pytest.raises(InputError, match="data was made with another tokenizer than "):
            score_path(model, str(tmp_path / "data"), tiny_run.config.eval, "float32")


@pytest.mark.slow  # tests/data/test_build.py prepares it
def test_validation_text_alone_is_scored_and_not_trained_on(tiny_run, tmp_path, tiny_text):
    text, data, how = tiny_text / "c4-validation.*", str(tmp_path / "data"), tiny_run.config.eval
    prepare("", str(text), str(tiny_text / "t.model"), 32, data, workers=1)
    alone = score_path(str(tiny_run.folder), data, how, "float32")
    np.testing.assert_allclose(alone.loss, tiny_run.summary["validation_loss"], rtol=1e-5)
    config = dataclasses.replace(
        tiny_run.config,
        data=dataclasses.replace(tiny_run.config.data, directory=data),
        run_dir=str(tmp_path / "run"),
    )
    with pytest.raises(InputError, match="has validation text alone"):
        pretrain(config)
    assert not (tmp_path / "run").exists()


def test_a_data_set_that_is_away_is_named_anew(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run.folder, tmp_path / "run")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(tiny_run.config.data.directory, "gone"))
    with pytest.raises(InputError, match=r"gone is not a data set .* elsewhere, name it with --data"):
        score_path(str(run), "", tiny_run.config.eval, "float32")
