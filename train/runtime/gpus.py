"""The GPUs of this machine, found without starting JAX, which would take their memory."""

import math
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from mora_jax.errors import InputError

# The variable for the share of a GPU's memory that JAX takes.
MEMORY_SHARE = "XLA_PYTHON_CLIENT_MEM_FRACTION"


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


def _count() -> int:
    if shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
        if listed.returncode == 0:
            return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    return sum(bool(re.fullmatch(r"nvidia\d+", path.name)) for path in Path("/dev").glob("nvidia*"))


def memory_share(default: float, environment: Mapping[str, str] = os.environ) -> float:
    """Returns the share of a GPU's memory that JAX takes, or a default if the environment says nothing.

    Raises:
      InputError: if the environment says something that is no share.
    """
    text = environment.get(MEMORY_SHARE) or str(default)
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 < share < math.inf:
        raise InputError(f"{MEMORY_SHARE} is a share of memory such as 0.75, not {text!r}")
    return share
