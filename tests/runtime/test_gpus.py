"""The GPUs of a machine, as environment variables and nvidia-smi name them."""

from pathlib import Path

import pytest

from mora_jax.errors import InputError
from train.runtime.gpus import MEMORY_SHARE, gpus, memory_share


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({"CUDA_VISIBLE_DEVICES": "2, GPU-a"}, ["2", "GPU-a"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, []),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, []),
        ({"CUDA_VISIBLE_DEVICES": "0", "JAX_PLATFORMS": "cpu"}, []),
        ({"CUDA_VISIBLE_DEVICES": "0", "JAX_PLATFORMS": "cuda,cpu"}, ["0"]),
    ],
)
def test_gpus_are_those_that_the_environment_shows(environment, found):
    assert gpus(environment) == found


def test_gpus_are_counted_by_nvidia_smi(tmp_path: Path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: H100 (UUID: a)'\necho 'GPU 1: H100 (UUID: b)'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert gpus({}) == ["0", "1"]


def test_the_share_of_a_gpu_that_jax_takes():
    for text, share in [("", 0.75), ("0.9", 0.9)]:
        assert memory_share(0.75, {MEMORY_SHARE: text}) == share
    for text in ("most", "0", "nan"):
        with pytest.raises(InputError, match=f"a share of memory such as 0.75, not '{text}'"):
            memory_share(0.75, {MEMORY_SHARE: text})
