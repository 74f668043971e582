"""What the runs of a study train on: groups of GPUs, or the machine itself."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Mapping

from mora_jax.errors import InputError
from train.runtime.gpus import MEMORY_SHARE, gpus, memory_share

# Seconds that a GPU has to answer.
_PATIENCE = 120


@dataclasses.dataclass(frozen=True)
class Device:
    """What one run trains on.

    Attributes:
      name: for people, such as "GPU 0".
      environment: variables that give it to a process; none for a machine without GPUs.
    """

    name: str
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)


def devices(gpus_per_run: int, jobs: int, environment: Mapping[str, str] = os.environ) -> list[Device]:
    """Returns the devices of this machine: groups of GPUs, or the machine itself if it has none.

    Args:
      gpus_per_run: GPUs of a run.
      jobs: runs at a time on each device, which share its memory.
      environment: of this process.

    Raises:
      InputError: if the machine has fewer GPUs than a run needs, or a share of memory is none.
    """
    found = gpus(environment)
    if not found:
        if gpus_per_run > 1:
            raise InputError(f"--gpus-per-run {gpus_per_run}: this machine has no GPU")
        return [Device("this machine")]
    if len(found) < gpus_per_run:
        raise InputError(f"--gpus-per-run {gpus_per_run}: this machine has {len(found)}")
    shared: dict[str, str] = {}
    if jobs > 1:
        shared[MEMORY_SHARE] = f"{memory_share(0.9, environment) / jobs:.4f}"
    # With a list of platforms, JAX fails if it cannot use the GPU; without, it would train on the CPU.
    shared["JAX_PLATFORMS"] = environment.get("JAX_PLATFORMS") or "cuda,cpu"
    groups = [found[i : i + gpus_per_run] for i in range(0, len(found) - gpus_per_run + 1, gpus_per_run)]
    return [
        Device(f"GPU {'+'.join(group)}", {**shared, "CUDA_VISIBLE_DEVICES": ",".join(group)})
        for group in groups
    ]


def works(device: Device) -> bool:
    """Returns whether a process that starts JAX finds all GPUs of a device. It takes some seconds."""
    count = len(device.environment.get("CUDA_VISIBLE_DEVICES", "0").split(","))
    program = f"import jax; assert len(jax.local_devices()) >= {count}"
    try:
        ended = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, **device.environment, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_PATIENCE,
        )
    except subprocess.TimeoutExpired:
        return False
    return ended.returncode == 0
