"""Runs of format 1 are read and resumed; a run of a newer format is refused.

The runs are made of a tiny run of today, by taking back what has changed since.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from tiny_runs import arrays, equal_runs

from mora_jax import sharding
from mora_jax.errors import InputError
from train.config import old
from train.config import run as run_config
from train.jobs import pretrain as loop
from train.run import manifest
from train.run.checkpoint import Checkpoints
from train.run.folder import read_config
from train.run.meta import read_meta
from train.run.model import load_model
from train.run.state import restore_state
from train.storage.format import FORMAT


def old_config(config: run_config.RunConfig) -> dict[str, Any]:
    """Returns a plain config with the keys of format 1."""
    plain = run_config.to_plain(config)
    params, remat = plain.pop("params"), plain["compute"].pop("remat")
    plain["method"] |= {"adapt": params["adapt"], "train": params["train"]}
    assert (plain["compute"]["layers"], remat) == ("scan", "dots")  # it was called scan
    plain["optimizer"].pop("groups")
    return plain


def written_by_format_1(tiny_run, folder: Path, step: int) -> Path:
    """Writes the tiny run after `step` updates as format 1 wrote it."""
    plain = old_config(dataclasses.replace(tiny_run.config, run_dir=str(folder)))
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
    shutil.copy(tiny_run.folder / "metrics.jsonl", folder)
    with (
        Checkpoints(str(tiny_run.folder / "checkpoints")) as original,
        Checkpoints(str(folder / "checkpoints")) as saved,
    ):
        state, _ = restore_state(tiny_run.config, original, step, sharding.make_mesh(1))
        meta = original.read_meta(step) | {"config": plain}
        choices = meta["methods"].items()
        meta["methods"] = {p: c["method"] if isinstance(c, dict) and "method" in c else c for p, c in choices}
        assert meta["methods"] != original.read_meta(step)["methods"]
        del meta["format"]
        names = {name: old.STATE_FIELDS.get(name, name) for name in vars(state)}
        saved.save(step, {names[name]: value for name, value in vars(state).items()}, meta)
    return folder


@pytest.mark.slow
def test_a_finished_run_of_format_1_has_its_model(tiny_run, tmp_path):
    folder = written_by_format_1(tiny_run, tmp_path / "run", 22)
    (params, model), (expected, _) = load_model(str(folder)), load_model(str(tiny_run.folder))
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert model == tiny_run.config.model


def test_an_unfinished_run_of_format_1_resumes_bit_for_bit(free, tiny_run):
    folder = written_by_format_1(tiny_run, Path(free.run_dir), 18)
    loop.pretrain(free)
    equal_runs(free, folder, tiny_run.folder)
    assert (folder / "config.yaml").read_text().startswith(f"format: {FORMAT}\n")
    with Checkpoints(str(folder / "checkpoints")) as saved:
        assert [saved.read_meta(step).get("format") for step in (18, 21, 22)] == [None, FORMAT, FORMAT]


def test_a_run_of_a_newer_format_is_refused(tiny_run, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    plain = {"format": FORMAT + 1} | run_config.to_plain(tiny_run.config)
    (folder / "config.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
    message = f"has format {FORMAT + 1}, and this version reads formats up to {FORMAT}"
    with pytest.raises(InputError, match=message):
        read_config(str(folder))
    with Checkpoints(str(tiny_run.folder / "checkpoints")) as original:
        meta = original.read_meta(3)
    with Checkpoints(str(folder / "checkpoints")) as saved:
        saved.save(3, {"a": np.zeros(1)}, meta | {"format": FORMAT + 1})
        saved.wait()
        with pytest.raises(InputError, match=message):
            read_meta(saved, 3)


@pytest.mark.slow
def test_a_run_of_an_older_format_goes_on_and_then_keeps_its_base(tiny_run, free):
    """Format 3 held everything in every checkpoint."""
    folder = Path(free.run_dir)
    (folder / "checkpoints").mkdir(parents=True)
    text = (tiny_run.folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace(f"format: {FORMAT}", "format: 3"))
    shutil.copy(tiny_run.folder / "metrics.jsonl", folder)
    with (
        Checkpoints(str(tiny_run.folder / "checkpoints")) as original,
        Checkpoints(str(folder / "checkpoints")) as saved,
    ):
        state, _ = restore_state(free, original, 15, sharding.make_mesh(1))
        saved.save(15, state, original.read_meta(15) | {"format": 3})
    assert "base" not in manifest.read(saved.folder(15), 15)
    loop.pretrain(free)
    for ours, theirs in zip(arrays(free, folder, 22), arrays(free, tiny_run.folder, 22), strict=True):
        assert ours.tobytes() == theirs.tobytes()
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "15",
        "18",
        "21",
        "22",
        "base-10",
        "base-8",
    ]
