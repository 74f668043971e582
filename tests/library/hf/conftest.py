"""Folders that the tests of this room share."""

import shutil

import pytest
from hf_folders import CONFIG, random_params

from mora_jax import hf


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    """A model in one file, and in several with an index."""
    root = tmp_path_factory.mktemp("originals")
    for name, limit in (("one", 10**9), ("several", 30_000)):
        hf.save_hf(root / name, random_params(CONFIG), CONFIG, max_shard_bytes=limit)
    return root


@pytest.fixture
def folder(originals, tmp_path):
    """A model in one file."""
    return shutil.copytree(originals / "one", tmp_path / "hf")


@pytest.fixture
def sharded(originals, tmp_path):
    """A model in several files with an index."""
    return shutil.copytree(originals / "several", tmp_path / "hf")
