"""A whole tiny run: what it writes, its restarts, and what it refuses to begin."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from etils import epath
from tiny_runs import lines

from mora_jax.errors import InputError
from train.config import flags
from train.data.rows.info import load_info
from train.jobs import pretrain as loop
from train.run import session
from train.run.checkpoint import Checkpoints
from train.run.folder import read_config


def test_a_run_learns_and_restarts_through_both_group_types(tiny_run):
    logged = lines(tiny_run.folder)
    restarts = [line for line in logged if "restart" in line]
    assert [line["step"] for line in restarts] == list(range(2, 22, 2))
    assert [line["restart"] for line in restarts] == list(range(1, 11))
    assert [line["group_type"] for line in restarts] == ["1", "0"] * 5
    assert all(line["optimizer_cleared"] == 1.0 for line in restarts)
    losses = [line["loss"] for line in logged if "loss" in line]
    assert losses[-1] < losses[0] - 0.5


def test_ten_restarts_compile_the_step_once_for_each_group_type(tiny_run):
    assert tiny_run.summary["restarts"] == 10
    assert tiny_run.compilations == {"train_step": 2, "restart_step": 2}


def test_every_update_and_evaluation_has_a_line(tiny_run):
    logged = lines(tiny_run.folder)
    updates = [line for line in logged if "loss" in line]
    assert [line["step"] for line in updates] == list(range(22))
    assert {"step", "loss", "grad_norm", "learning_rate", "data_wait", "tokens"} <= set(updates[0])
    assert [line["tokens"] for line in updates] == [(s + 1) * 4 * 32 for s in range(22)]
    assert [line["learning_rate"] == 0 for line in updates] == [True, False] * 11
    assert all("tokens_per_second" not in line for line in updates if line["step"] % 2 == 0)  # after a pause
    evaluations = [line for line in logged if "validation_loss" in line]
    assert [line["step"] for line in evaluations] == [10, 21]
    np.testing.assert_allclose(
        [np.exp(line["validation_loss"]) for line in evaluations],
        [line["validation_perplexity"] for line in evaluations],
    )


def test_a_log_that_cannot_be_read_leaves_a_summary(tiny_run, tmp_path, capfd):
    """A value changed after the run's start. At the start, the line is refused."""
    folder = shutil.copytree(tiny_run.folder, tmp_path / "run")
    for name in ("summary.json", "loss.png"):
        (folder / name).unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "tokens_per_second": "fast"}\n')
    loop.draw(epath.Path(folder))
    assert "warning: loss.png is not drawn: " in capfd.readouterr().err
    assert loop.logged_rate(epath.Path(folder)) == 0
    with pytest.raises(InputError, match="tokens_per_second is 'fast', not a number"):
        loop.pretrain(dataclasses.replace(tiny_run.config, run_dir=str(folder)))


def test_the_summary_and_the_plot(tiny_run):
    assert json.loads((tiny_run.folder / "summary.json").read_text()) == tiny_run.summary
    assert (tiny_run.summary["steps"], tiny_run.summary["tokens"]) == (22, 22 * 4 * 32)
    assert tiny_run.summary["validation_loss"] == lines(tiny_run.folder)[-1]["validation_loss"]
    assert tiny_run.summary["tokens_per_second"] > 0
    assert tiny_run.summary["unigram_perplexity"] > 1
    assert {"validation_perplexity", "restarts", "device"} <= tiny_run.summary.keys()
    assert (tiny_run.folder / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_meta_of_a_checkpoint(tiny_run):
    with Checkpoints(str(tiny_run.folder / "checkpoints")) as saved:
        assert saved.steps() == [3, 6, 9, 12, 15, 18, 21, 22]
        meta = {step: saved.read_meta(step) for step in (3, 6, 9)}
    info = load_info(tiny_run.config.data.directory)
    text = {"tokenizer_sha256": info.tokenizer_sha256, "rows": info.rows["train"]}
    text["loss_tokens"] = info.counts["train"].loss_tokens
    rows = meta[6]["data"].pop("next_rows")
    assert meta[6]["data"] == {"step": 6, "seed": 0, **text}
    assert len(rows) == 4
    assert rows != meta[3]["data"]["next_rows"]
    assert meta[6]["random"].keys() == {"params", "adapters", "pruning", "dropout"}
    # The restart at update 6 comes after the saving at 6.
    assert [meta[step]["restarts"] for step in (3, 6, 9)] == [1, 2, 4]
    kernel = "layers/mlp/up_proj/kernel"
    groups = [meta[step]["methods"][kernel]["method"]["operator"]["group"] for step in (3, 6, 9)]
    assert groups == [1, 0, 0]


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("batch_size / microbatches 6 does not divide among 4 devices", {"mesh.data": 4, "batch_size": 6}),
        (r"eval\.batch_size 6 does not divide", {"mesh.data": 4, "eval.batch_size": 6}),
        (r"mesh\.data 64 needs 64 devices", {"mesh.data": 64}),
        ("fewer than one batch of 100000", {"batch_size": 100_000}),
        ("more than model.vocab_size 100", {"model.vocab_size": 100}),
        ("rows of 32 tokens, not data.sequence_length 16", {"data.sequence_length": 16}),
        ("is missing", {"init_from": "nowhere"}),
        ("cudnn needs an NVIDIA GPU", {"compute.attention": "cudnn", "compute.dtype": "bfloat16"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_leaves_no_run_behind(tiny_yaml, tmp_path, message, changes):
    words = [word for name, value in changes.items() for word in (f"--{name}", str(value))]
    config = flags.read_config(str(tiny_yaml), ["--run-dir", str(tmp_path / "run"), *words])
    with pytest.raises(InputError, match=message):
        loop.pretrain(config)
    with pytest.raises(InputError, match="holds no run"):
        read_config(config.run_dir)


@pytest.mark.parametrize(
    ("every", "updates"), [(0, [7]), (3, [2, 5, 7]), (4, [3, 7])], ids=lambda value: str(value)
)
def test_when_something_is_due(tiny_run, every, updates):
    config = dataclasses.replace(tiny_run.config, steps=8)
    assert [step - 1 for step in range(9) if session.due(every, step, config)] == updates
