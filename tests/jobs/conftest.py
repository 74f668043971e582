"""Fixtures of the tests of jobs."""

import shutil

import pytest


@pytest.fixture
def free(tiny_run):
    """The tiny run's config, its own folder free before and after."""
    shutil.rmtree(tiny_run.config.run_dir, ignore_errors=True)
    yield tiny_run.config
    shutil.rmtree(tiny_run.config.run_dir, ignore_errors=True)
