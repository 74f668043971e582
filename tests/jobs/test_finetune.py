"""`mora finetune`: the model of init_from, epochs in the place of steps."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from slow import quick
from tiny import TINY

from mora_jax import hf
from mora_jax.errors import InputError
from train.cli import main as cli
from train.config import flags
from train.config.sections import Schedule
from train.data.rows.info import load_info
from train.run.folder import read_config
from train.run.model import load_model

EPOCHS = 0.02


@pytest.fixture
def config(tmp_path: Path, tiny_data: Path) -> Path:
    """A config that says nothing of the model."""
    plain = yaml.safe_load(TINY) | {"epochs": EPOCHS, "schedule": {"kind": "cosine", "warmup": 1}}
    plain["data"] = {"directory": str(tiny_data), "sequence_length": 32}
    for key in ("model", "steps", "restart"):
        plain.pop(key)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(plain))
    return tmp_path / "c.yaml"


@pytest.fixture(params=quick(["folder"], ["run", "folder"]))
def source(request, tiny_run, tmp_path: Path) -> Path:
    """A model to start from: a run, or a Hugging Face folder."""
    if request.param == "run":
        return tiny_run.folder
    hf.save_hf(tmp_path / "hf", *load_model(str(tiny_run.folder)))
    return tmp_path / "hf"


def test_the_model_and_the_steps_are_those_of_what_is_there(config, source, tiny_run, tmp_path, capsys):
    words = [str(config), "--init-from", str(source), "--run-dir", str(tmp_path / "run")]
    cli.main(["finetune", *words])
    rows = load_info(str(tiny_run.config.data.directory)).rows["train"]
    made, steps = read_config(str(tmp_path / "run")), round(EPOCHS * rows / tiny_run.config.batch_size)
    assert made.model == tiny_run.config.model
    assert (made.steps, made.epochs) == (steps, 0.0)
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] < np.log(tiny_run.config.model.vocab_size) - 0.5  # it is no random model
    capsys.readouterr()
    cli.main(["finetune", *words])  # the same command finds the finished run
    assert f"steps │ {steps}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow  # the test above counts those that it trains
def test_a_dry_run_counts_the_steps(config, tiny_run, capsys):
    cli.main(["finetune", str(config), "--init-from", str(tiny_run.folder), "--dry-run"])
    rows = load_info(str(tiny_run.config.data.directory)).rows["train"]
    assert f"{round(EPOCHS * rows / tiny_run.config.batch_size)} steps" in capsys.readouterr().out


def test_options_of_the_model_are_taken_as_they_are_given(config, tiny_run):
    words = ["--init-from", str(tiny_run.folder)]
    assert flags.read_config(str(config), words).model == tiny_run.config.model
    assert flags.read_config(str(config), [*words, "--model.hidden-size", "64"]).model.hidden_size == 64
    other = flags.read_config(str(config), [*words, "--model.hidden-size", "64"]).model
    assert other.num_hidden_layers != tiny_run.config.model.num_hidden_layers


def test_rows_are_no_longer_than_the_context(config, tiny_run):
    plain = yaml.safe_load(config.read_text())
    del plain["data"]
    config.write_text(yaml.safe_dump(plain))
    made = flags.read_config(str(config), ["--init-from", str(tiny_run.folder)])
    assert made.data.sequence_length == tiny_run.config.model.max_position_embeddings


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "mora finetune needs a model: --init-from FOLDER"),
        (["--init-from", "nowhere"], "--init-from: nowhere is missing"),
        (["--init-from", "RUN", "--steps", "7"], "give either steps or epochs"),
        (["--init-from", "RUN", "--epochs", "-1"], "epochs must be at least 0"),
        (["--init-from", "RUN", "--data.directory", "nowhere"], "nowhere is not a data set"),
    ],
)
def test_what_is_wrong_is_one_line(config, tiny_run, tmp_path, words, message, capsys):
    words = [str(tiny_run.folder) if word == "RUN" else word for word in words]
    with pytest.raises(SystemExit) as ended:
        cli.main(["finetune", str(config), "--run-dir", str(tmp_path / "run"), *words])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in " ".join(error.split())
    assert error.count("\n") == 1


def test_steps_of_many_epochs():
    config = flags.config_from_plain({"epochs": 3, "batch_size": 16, "schedule": {"warmup": 1}})
    assert config.in_steps(100).steps == 19
    assert config.in_steps(1).steps == 1
    with pytest.raises(InputError, match=r"schedule.warmup 20 is longer than the run of 19 steps"):
        dataclasses.replace(config, schedule=Schedule(warmup=20)).in_steps(100)
