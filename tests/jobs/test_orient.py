"""Runs whose adapters are oriented, that is fitted, to gradients, at the start and after each restart."""

import numpy as np
import pytest
import yaml
from tiny import TINY
from tiny_runs import Interrupted, arrays, lines, stop_after, without_times

from train.cli import main as cli
from train.config import flags

STEPS, EVERY = 6, 2
CONFIG = {
    "steps": STEPS,
    "method": {"name": "spectral", "rank": 4, "multiple": 8, "bases": "sampled"},
    "restart": {"every": EVERY, "warmup": 1},
    "eval": {"every": 0, "batch_size": 4, "max_batches": 1},
    "checkpoint": {"every": EVERY, "keep": 0},
    "bad_steps": {"window": 1},
}


@pytest.fixture(scope="module")
def config_file(tiny_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("oriented")
    plain = yaml.safe_load(TINY) | {"data": {"directory": str(tiny_data), "sequence_length": 32}} | CONFIG
    (folder / "c.yaml").write_text(yaml.safe_dump(plain))
    return folder / "c.yaml"


@pytest.fixture(scope="module")
def run(config_file):
    pretrain(config_file, config_file.parent / "run")
    return config_file.parent / "run"


def pretrain(config_file, folder, *args: str) -> None:
    cli.main(["pretrain", str(config_file), "--run-dir", str(folder), *args])


def bases(config_file, folder, step: int) -> np.ndarray:
    """The bases u of the layers' q kernels."""
    (found,) = [
        a for a in arrays(flags.read_config(str(config_file)), folder, step) if a.shape == (2, 32, 16)
    ][:1]
    return found


def test_bases_are_orthonormal_and_change_at_restarts(run, config_file):
    seen = [bases(config_file, run, step) for step in (EVERY, 2 * EVERY, STEPS)]
    for u_LKR in seen:
        np.testing.assert_allclose(
            u_LKR.swapaxes(1, 2) @ u_LKR, np.broadcast_to(np.eye(u_LKR.shape[2]), (2, 16, 16)), atol=1e-5
        )
    assert np.abs(seen[0] - seen[1]).max() > 1e-2
    assert np.abs(seen[1] - seen[2]).max() > 1e-2


@pytest.mark.slow
def test_a_stopped_run_resumes_with_the_same_bits(run, config_file, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, EVERY + 1)
        with pytest.raises((SystemExit, Interrupted)):
            pretrain(config_file, tmp_path / "run")
    pretrain(config_file, tmp_path / "run")
    config = flags.read_config(str(config_file))
    for ours, theirs in zip(arrays(config, tmp_path / "run", STEPS), arrays(config, run, STEPS), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert without_times(tmp_path / "run") == without_times(run)


@pytest.mark.slow
def test_two_devices_find_the_same_directions(run, config_file, tmp_path):
    pretrain(config_file, tmp_path / "run", "--mesh.data", "1", "--mesh.fsdp", "2")
    ours, theirs = (
        np.array([line["loss"] for line in lines(f) if "loss" in line]) for f in (tmp_path / "run", run)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


@pytest.mark.slow
def test_a_plan_has_the_memory_of_the_gradients(config_file, capsys):
    cli.main(["plan", str(config_file), "--devices", "1"])
    assert "orient_step" in capsys.readouterr().out
    cli.main(["plan", str(config_file), "--devices", "1", "--method.name", "lora"])
    assert "orient_step" not in capsys.readouterr().out
