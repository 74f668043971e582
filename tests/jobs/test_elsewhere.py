"""A run is trained in one working folder, and resumed, scored and exported in another."""

import dataclasses
from pathlib import Path

import pytest

from train.config.sections import Data
from train.jobs.export import export
from train.jobs.pretrain import pretrain
from train.jobs.score import score_path
from train.run.folder import check_free, read_config


@pytest.mark.slow
def test_a_run_resumes_and_is_read_from_another_working_folder(tiny_run, tmp_path, monkeypatch):
    """Its paths are written as absolute ones. An equal path, spelled otherwise, is no difference."""
    monkeypatch.chdir(Path(tiny_run.config.data.directory).parent)
    data = Data("data", 32)
    config = dataclasses.replace(
        tiny_run.config, steps=4, data=data, run_dir=str(tmp_path / "run"), init_from=str(tiny_run.folder)
    )
    pretrain(config)
    check_free(config, resume=True)
    assert read_config(config.run_dir).data.directory == tiny_run.config.data.directory
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    score_path(config.run_dir, "", config.eval, "float32")
    export(config.run_dir, "out", "float32")
    assert (elsewhere / "out/tokenizer.json").exists()
