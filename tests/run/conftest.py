"""Fixtures of the tests of runs."""

import shutil
from pathlib import Path

import pytest
from states import a_state

from train.run.checkpoint import Checkpoints


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good checkpoints of steps 1 and 2, to be copied."""
    directory = tmp_path_factory.mktemp("pristine") / "checkpoints"
    with Checkpoints(str(directory)) as saved:
        saved.save(1, a_state(1), {"step": 1})
        saved.save(2, a_state(2), {"step": 2})
    return directory


@pytest.fixture
def directory(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "checkpoints")
