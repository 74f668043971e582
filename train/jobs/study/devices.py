"""The GPUs of this machine, found without starting JAX, which would take their memory."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from mora_jax.errors import InputError

_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
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
      InputError: if the machine has fewer GPUs than a run needs.
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
        shared[_FRACTION] = f"{float(environment.get(_FRACTION) or 0.9) / jobs:.4f}"
    # With a list of platforms, JAX fails if it cannot use the GPU; without, it would train on the CPU.
    shared["JAX_PLATFORMS"] = environment.get("JAX_PLATFORMS") or "cuda,cpu"
    groups = [found[i : i + gpus_per_run] for i in range(0, len(found) - gpus_per_run + 1, gpus_per_run)]
    return [
        Device(f"GPU {'+'.join(group)}", {**shared, "CUDA_VISIBLE_DEVICES": ",".join(group)})
        for group in groups
    ]


def gpus(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Returns the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return []
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        return [] if "-1" in names or "" in names else names
    return [str(i) for i in range(_count())]


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


def _count() -> int:
    if shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
        if listed.returncode == 0:
            return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    return sum(bool(re.fullmatch(r"nvidia\d+", path.name)) for path in Path("/dev").glob("nvidia*"))
