"""docs/scaling.md: the installed versions know its XLA flags, and its files exist."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/scaling.md").read_text()
TPU_TOPOLOGY = """
from train.perf.plan.targets import topology, use_no_accelerator
use_no_accelerator()
assert len(topology("v5e:2x2").devices) == 4
"""


def flags(variable: str) -> list[str]:
    """Returns all flags that the page's table gives for a variable."""
    return re.findall(rf"`{variable}=(--[a-z0-9_]+=[a-z0-9.]+)`", PAGE)


def runs(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.slow
def test_xla_knows_the_flags():
    assert len(flags("XLA_FLAGS")) >= 4
    code = "import jax; jax.numpy.ones(1).block_until_ready()"
    assert runs(code, XLA_FLAGS="--xla_no_such_flag=true").returncode != 0
    done = runs(code, XLA_FLAGS=" ".join(flags("XLA_FLAGS")))
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra `tpu`")
def test_libtpu_knows_the_flags():
    assert len(flags("LIBTPU_INIT_ARGS")) >= 3
    assert runs(TPU_TOPOLOGY, LIBTPU_INIT_ARGS="--xla_tpu_no_such_flag=true").returncode != 0
    done = runs(TPU_TOPOLOGY, LIBTPU_INIT_ARGS=" ".join(flags("LIBTPU_INIT_ARGS")))
    assert done.returncode == 0, done.stderr


def test_the_configs_on_the_page_exist():
    named = set(re.findall(r"configs/\w+\.yaml", PAGE))
    assert len(named) >= 3
    assert all((ROOT / name).exists() for name in named)
