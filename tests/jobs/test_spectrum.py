"""`mora spectrum`: the singular values of what a run changed since its start."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from mora_jax import hf, trees
from mora_jax.errors import InputError
from train.cli import main as cli
from train.jobs.spectrum import spectra
from train.run.model import load_model
from train.step.spec import spec_of
from train.step.state import init_params


@pytest.fixture(scope="module")
def start(tiny_run):
    """The parameters that the run was started with."""
    return jax.jit(init_params, static_argnums=0)(spec_of(tiny_run.config))


@pytest.mark.slow
def test_the_sum_of_all_updates_over_the_restarts(tiny_run, start):
    found = {(each.kernel, each.layer): each.values_R for each in spectra(str(tiny_run.folder))}
    before, after = trees.flatten(start), trees.flatten(load_model(str(tiny_run.folder))[0])
    kernels = [path for path in before if path.startswith("layers/") and path.endswith("kernel")]
    assert found.keys() == {(path, layer) for path in kernels for layer in range(2)}
    for (path, layer), values_R in found.items():
        dw = np.asarray(after[path][layer] - before[path][layer], np.float64)
        np.testing.assert_allclose(values_R, np.linalg.svd(dw, compute_uv=False), atol=1e-5)


def test_a_folder_beside_another(tiny_run, start, tmp_path):
    """One kernel of one layer changed, by a known update of rank 2."""
    flat = trees.flatten(start)
    path = "layers/mlp/up_proj/kernel"
    changed = dict(flat) | {path: flat[path].at[1, 0, 0].add(3.0).at[1, 1, 1].add(0.05)}
    for name, arrays in (("a", flat), ("b", changed)):
        hf.save_hf(tmp_path / name, trees.unflatten(arrays), tiny_run.config.model)
    (only,) = spectra(str(tmp_path / "b"), str(tmp_path / "a"))
    assert (only.kernel, only.layer, only.above, only.rank) == (path, 1, 1, 2)
    np.testing.assert_allclose(only.values_R[:3], [3.0, 0.05, 0.0], atol=1e-6)
    with pytest.raises(InputError, match="is no run: --before names"):
        spectra(str(tmp_path / "b"))
    with pytest.raises(InputError, match=r"no kernel of .*a differs from"):
        spectra(str(tmp_path / "a"), str(tmp_path / "a"))


@pytest.mark.slow
def test_models_of_other_shapes_are_refused(tiny_run, start, tmp_path):
    model = dataclasses.replace(tiny_run.config.model, num_hidden_layers=1)
    halved = {p: a[:1] if p.startswith("layers/") else a for p, a in trees.flatten(start).items()}
    hf.save_hf(tmp_path / "half", trees.unflatten(halved), model)
    with pytest.raises(InputError, match="have other shapes"):
        spectra(str(tiny_run.folder), str(tmp_path / "half"))


def test_other_random_numbers_at_the_start_are_refused(tiny_run, monkeypatch):
    monkeypatch.setattr("train.jobs.spectrum.random_state", lambda spec, step: {})
    with pytest.raises(InputError, match="was started with other random numbers"):
        spectra(str(tiny_run.folder))


def test_the_command(tiny_run, tmp_path, capsys):
    out, picture = tmp_path / "s.json", tmp_path / "s.png"
    words = ["spectrum", str(tiny_run.folder), "--out", str(out), "--picture", str(picture)]
    cli.main(words)
    assert "layers/self_attn/q_proj/kernel" in capsys.readouterr().out
    rows = json.loads(out.read_text())
    assert len(rows) == 14
    assert all(len(row["values_R"]) == 32 >= row["rank"] > 0 for row in rows)
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        cli.main(words)  # the files are there
    assert "--out" in capsys.readouterr().err
