"""Folders that the tests of this room share."""

import pytest
from hf_folders import CONFIG, random_params

from mora_jax import hf


@pytest.fixture
def folder(tmp_path):
    """A model in one file."""
    hf.save_hf(tmp_path / "hf", random_params(CONFIG), CONFIG)
    return tmp_path / "hf"


@pytest.fixture
def sharded(tmp_path):
    """A model in several files with an index."""
    hf.save_hf(tmp_path / "hf", random_params(CONFIG), CONFIG, max_shard_bytes=30_000)
    return tmp_path / "hf"
