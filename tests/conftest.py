"""Shared set-up: CPU devices are forced before JAX starts; rank promotion raises."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from pathlib import Path

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED = Path(__file__).parents[2] / "shared"


def _folder(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"needs the reference folder ../shared/{name}, which is not here")
    return folder


@pytest.fixture
def golden() -> Path:
    """The folder of numbers recorded from the authors' implementation."""
    return _folder("golden")


@pytest.fixture
def corpus() -> Path:
    """The folder of real text in C4's format."""
    return _folder("corpus")


@pytest.fixture
def tokenizers() -> Path:
    """The folder with a real SentencePiece model."""
    return _folder("tokenizers")
