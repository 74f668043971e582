"""Fixtures of the tests of runs."""

import shutil
from pathlib import Path

import pytest
from states import a_state

from mora_jax import hf
from train.run.checkpoint import Checkpoints
from train.run.model import load_model


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good checkpoints of steps 1 and 2, to be copied."""
    directory = tmp_path_factory.mktemp("pristine") / "checkpoints"
    with Checkpoints(str(directory)) as saved:
        saved.save(1, a_state(1), {"step": 1})
        saved.save(2, a_state(2), {"step": 2})
    return directory


@pytest.fixture(scope="session")
def hf_model(tiny_run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished tiny run as a Hugging Face folder, to be copied."""
    folder = tmp_path_factory.mktemp("hf_model") / "hf"
    hf.save_hf(folder, *load_model(str(tiny_run.folder)))
    return folder


@pytest.fixture
def directory(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "checkpoints")
