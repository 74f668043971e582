"""A new method is one file and one entry in METHODS. Everything else follows without another edit."""

import importlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from tiny import TINY
from tiny_runs import Interrupted, arrays, lines, stop_after, without_times

from mora_jax import METHODS, load_hf, sharding, trees
from train.cli import main as cli
from train.config import flags
from train.run.model import load_model
from train.run.state import abstract_state, assign_methods
from train.step.spec import spec_of
from train.step.state import init_params

FILE = '''
"""Offsets: every input adds one trained number times itself to all outputs."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mora_jax import METHODS, Leaf, Method
from mora_jax.methods.peft import PeftAdapter
from mora_jax.sharding import Layout


@dataclasses.dataclass(frozen=True)
class Offsets(Method):
    """y = x @ w + scale (x @ u) 1^T.

    Attributes:
      scale: multiple of u.
    """

    scale: float = 1.0
    name: ClassVar[str] = "offsets"

    def init(self, key, w):
        return {"u_K": jnp.zeros(w.shape[0])}

    def leaves(self):
        return {"u_K": Leaf(layout=Layout((P("fsdp"), P())))}

    def count(self, k, d):
        return k

    def rank_bound(self, k, d):
        return 1

    def weight(self, arrays, w):
        return w + (self.scale * arrays["u_K"])[:, None].astype(w.dtype)

    def delta(self, arrays, x, d):
        y = x @ (self.scale * arrays["u_K"]).astype(x.dtype)
        return jnp.broadcast_to(y[..., None], (*x.shape[:-1], d))

    def to_peft(self, arrays, k, d):
        return PeftAdapter({"lora_A": arrays["u_K"][None, :], "lora_B": jnp.ones((d, 1))}, 1, self.scale)


METHODS["offsets"] = Offsets
'''
STEPS = 6
CONFIG = {
    "steps": STEPS,
    "rules": [
        ["layers/.*_proj/kernel", {"name": "offsets", "scale": 2.0}],
        ["embed_tokens/embedding|(layers/)?[a-z_]*norm/scale|lm_head/kernel", "train"],
        [".*", "frozen"],
    ],
    "eval": {"every": 0, "batch_size": 4, "max_batches": 1},
    "checkpoint": {"every": 2, "keep": 0},
}


@pytest.fixture(scope="module")
def config_file(tiny_data, tmp_path_factory):
    """A config of the method, which is known as long as the tests of this file run."""
    folder = tmp_path_factory.mktemp("new_method")
    (folder / "offsets.py").write_text(FILE)
    sys.path.insert(0, str(folder))
    importlib.import_module("offsets")
    plain = yaml.safe_load(TINY) | {"data": {"directory": str(tiny_data), "sequence_length": 32}} | CONFIG
    del plain["method"]
    (folder / "new.yaml").write_text(yaml.safe_dump(plain))
    yield str(folder / "new.yaml")
    sys.path.remove(str(folder))
    del sys.modules["offsets"], METHODS["offsets"]


@pytest.fixture(scope="module")
def run(config_file) -> Path:
    """A finished run on one device."""
    folder = Path(config_file).parent / "run"
    pretrain(config_file, folder)
    return folder


def pretrain(config_file: str, folder: Path, *args: str) -> None:
    cli.main(["pretrain", config_file, "--run-dir", str(folder), *args])


def test_it_is_trained_and_restarted(run, config_file):
    config = flags.read_config(config_file)
    assert json.loads((run / "summary.json").read_text())["restarts"] == 2
    losses = [line["loss"] for line in lines(run) if "loss" in line]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]
    before = jax.jit(init_params, static_argnums=0)(spec_of(config))["layers"]["mlp"]["up_proj"]["kernel"]
    cli.main(["export", str(run), str(run / "export")])
    after = load_hf(str(run / "export"))[0]["layers"]["mlp"]["up_proj"]["kernel"]
    change_LKD = np.asarray(after) - np.asarray(before)
    assert np.abs(change_LKD).max() > 1e-3
    np.testing.assert_allclose(
        change_LKD, change_LKD.mean(axis=-1, keepdims=True) + 0 * change_LKD, atol=1e-6
    )


@pytest.mark.slow
def test_a_stopped_run_is_resumed(run, config_file, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises((SystemExit, Interrupted)):
            pretrain(config_file, tmp_path / "run")
    assert not (tmp_path / "run/summary.json").exists()
    pretrain(config_file, tmp_path / "run")
    config = flags.read_config(config_file)
    for ours, theirs in zip(arrays(config, tmp_path / "run", STEPS), arrays(config, run, STEPS), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert without_times(tmp_path / "run") == without_times(run)


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["fsdp", "data"])
def test_two_devices_train_it_as_one_does(run, config_file, tmp_path, axis):
    mesh = ["--mesh.data", "1", f"--mesh.{axis}", "2"]
    pretrain(config_file, tmp_path / "run", *mesh)
    ours, theirs = (
        np.array([line["loss"] for line in lines(f) if "loss" in line]) for f in (tmp_path / "run", run)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    config = flags.read_config(config_file, mesh)
    state = abstract_state(
        config, assign_methods(config), sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    )
    u_LK = state.adapters["layers"]["mlp"]["up_proj"]["kernel"]["u_K"]
    assert u_LK.sharding.shard_shape(u_LK.shape) == ((2, 16) if axis == "fsdp" else (2, 32))


@pytest.mark.slow
def test_its_adapter_is_lora_for_others(run, tmp_path):
    base, adapter, out = (str(tmp_path / name) for name in ("base", "adapter", "out"))
    cli.main(["export", str(run), adapter, "--adapter", "--with-base", base])
    cli.main(["merge", base, adapter, out])
    merged, (ours, _) = load_hf(out)[0], load_model(str(run))
    for path, leaf in trees.flatten(merged).items():
        np.testing.assert_allclose(leaf, trees.flatten(ours)[path], atol=1e-6, err_msg=path)


@pytest.mark.slow
def test_it_is_described_listed_and_planned(config_file, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    cli.main(["pretrain", config_file, "--dry-run"])
    assert "offsets" in capsys.readouterr().out
    cli.main(["methods"])
    row = next(line for line in capsys.readouterr().out.splitlines() if "offsets" in line)
    assert "same" in row
    assert f"{24 * (6 * 768 + 2560):,}" in row
    cli.main(["plan", config_file, "--devices", "2", "--mesh.data", "1", "--mesh.fsdp", "2"])
    assert "2 simulated devices" in capsys.readouterr().out


def test_its_flags_are_its_fields(config_file, tmp_path):
    (tmp_path / "c.yaml").write_text("{}")
    config = flags.read_config(str(tmp_path / "c.yaml"), ["--method.name", "offsets", "--method.scale", "3"])
    assert config.method == METHODS["offsets"](scale=3.0)  # pyright: ignore[reportCallIssue]


@pytest.mark.slow
def test_it_is_benchmarked(config_file, tmp_path):
    out = tmp_path / "figures.json"
    times = ["--warmup-steps", "1", "--timed-steps", "2"]
    cli.main(["bench", "step", "tiny", "--methods", "offsets", *times, "--out", str(out)])
    (row,) = json.loads(out.read_text())["rows"]
    assert row["what"] == {"framework": "jax", "name": "offsets", "path": "auto"}
    assert row["milliseconds"] > 0
