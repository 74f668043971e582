"""The dry run: right numbers, nothing allocated, nothing written."""

import os

import jax
import pytest

from mora_jax import On
from mora_jax.methods import LoRA, MoRA
from mora_jax.report import count_trained
from train.cli import main as cli
from train.data.rows.info import load_info


def dry_run(capsys, *args: str) -> str:
    cli.main(["pretrain", *args, "--dry-run"])
    return capsys.readouterr().out


@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_tiny_run(tiny_yaml, empty, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    out = dry_run(capsys, str(tiny_yaml), "--run-dir", "run")
    parameters = 2 * 384 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 48) + 5 * 32
    # r_hat is floor(sqrt(64 * 4)) = 16 in attention, and floor(sqrt(80 * 4)) = 17 in the MLP.
    trained = 2 * 384 * 32 + 5 * 32 + 2 * (4 * 16**2 + 3 * 17**2)
    for expected in (
        f"{parameters:,} parameters",
        f"{trained:,} parameters",
        f"{2 * (4 * 32 * 32 + 3 * 32 * 48):,} parameters",
        "128 tokens",
        "22 steps, 2,816 tokens",
        "384x32",
        "2x32x48",
        "mora r 4, r_hat 17",
        "layers/post_attention_layernorm/scale",
    ):
        assert expected in out
    restarts = next(line for line in out.splitlines() if "restarts" in line)
    assert "10" in restarts
    assert not os.listdir(empty)  # noqa: PTH208


def test_how_often_the_data_is_read(tiny_yaml, tiny_data, empty, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    rows = load_info(str(tiny_data)).rows["train"]
    out = dry_run(capsys, str(tiny_yaml), "--run-dir", "run", "--steps", "1000")
    assert f"{rows:,}, read {4000 / rows:.2f} times (epochs)" in out
    out = dry_run(capsys, str(tiny_yaml), "--run-dir", "run", "--data.directory", "nowhere")
    assert "unknown: nowhere is not a data set made by prepare-data" in out


@pytest.mark.parametrize("attention", ["xla", "cudnn"])
def test_a_large_model_allocates_nothing(empty, capsys, request, attention):
    config = request.config.rootpath / "configs/1_3b_remora.yaml"
    before = sum(array.nbytes for array in jax.live_arrays())
    out = dry_run(capsys, str(config), "--compute.attention", attention)
    assert sum(array.nbytes for array in jax.live_arrays()) <= before + 1024
    assert "1,339,492,352 parameters" in out
    assert "10,000 steps, 5,242,880,000 tokens" in out
    assert not os.listdir(empty)  # noqa: PTH208


def test_what_is_trained_of_one_parameter():
    assert count_trained("train", (3, 4, 5)) == 60
    assert count_trained("frozen", (3, 4, 5)) == 0
    assert count_trained(On(LoRA(2), stack=(0,)), (3, 4, 5)) == 3 * 2 * (4 + 5)
    assert count_trained(On(MoRA(2, align=128), stack=(0,)), (3, 4, 5)) == 3 * 4**2  # without padding


def test_a_config_that_does_not_fit_its_data(tiny_yaml, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["pretrain", str(tiny_yaml), "--dry-run", "--data.sequence-length", "16"])
    assert stop.value.code == 2
    assert "has rows of 32 tokens, not data.sequence_length 16" in capsys.readouterr().err


def test_rules_that_do_not_fit(tiny_yaml, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["pretrain", str(tiny_yaml), "--dry-run", "--params.adapt", "layers/mpl/.*"])
    assert stop.value.code == 2
    assert "matches no parameter" in capsys.readouterr().err
