"""Devices to plan for: those of a TPU topology, or simulated ones. None of them need be present."""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax

from mora_jax.errors import InputError
from train.config.sections import at_least

GIB = 2**30
CPU_COMPILER = "CPU compiler"
MOST_SIMULATED = 4096


@dataclasses.dataclass(frozen=True)
class Chip:
    """A type of TPU that the compiler knows.

    Attributes:
      dimensions: dimensions of its torus.
      memory: GiB of a device, from cloud.google.com/tpu/docs.
      usable: GiB that one program may use, from the compiler's message about a program that is too large.
      topologies: the topologies on offer, the largest last.
    """

    dimensions: int
    memory: int
    usable: float
    topologies: tuple[str, ...]


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
CHIPS = {
    "v5e": Chip(2, 16, 15.75, _FLAT),
    "v5p": Chip(3, 95, 95.74, _CUBES),
    "v6e": Chip(2, 32, 31.25, _FLAT),
}


@dataclasses.dataclass(frozen=True)
class Target:
    """The devices that a step is compiled for.

    Attributes:
      name: the user's name for them.
      compiler: the compiler that knows them.
      devices: the devices of the mesh.
      memory: bytes of one device that a program may use; 0 if unknown.
    """

    name: str
    compiler: str
    devices: list[Any]
    memory: int


def chips(name: str) -> int:
    """Returns the number of chips of a topology such as "v5e:16x16". Raises InputError for an unknown one."""
    chip, _, shape = name.partition(":")
    if chip not in CHIPS or not re.fullmatch(rf"\d+(x\d+){{{CHIPS[chip].dimensions - 1}}}", shape):
        raise InputError(_unknown(name))
    return math.prod(int(side) for side in shape.split("x"))


def topology(name: str) -> Target:
    """Returns the devices of a TPU topology such as "v5e:16x16", which the TPU compiler knows without a TPU.

    Raises:
      InputError: if the compiler (libtpu) is not installed, or does not know the topology.
    """
    alone = chips(name) == 1
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("--topology needs the TPU compiler: pip install 'mora_jax[tpu]' (Linux x86-64)")
    from importlib.metadata import version

    from jax.experimental import topologies

    _prepare_libtpu()
    single = {"chips_per_host_bounds": [1, 1, 1]} if alone else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **single)
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f"{_unknown(name)} ({str(error).splitlines()[0]})") from error
    compiler = f"TPU compiler (libtpu {version('libtpu')})"
    return Target(name, compiler, list(found.devices), round(CHIPS[name.partition(":")[0]].usable * GIB))


def simulated(count: int, memory: float) -> Target:
    """Returns CPU devices that simulate others, each of `memory` GiB; 0 if unknown.

    Raises:
      InputError: if the count or the memory is out of range, or JAX has already started with fewer.
    """
    at_least("--devices", count, 1, MOST_SIMULATED)
    at_least("--memory", memory, 0)
    with contextlib.suppress(RuntimeError):  # JAX has already started
        jax.config.update("jax_num_cpu_devices", count)
    found = jax.devices("cpu")
    if len(found) < count:
        raise InputError(f"--devices {count} is too many: JAX has started with {len(found)} CPU devices")
    name = "a simulated device" if count == 1 else f"{count} simulated devices"
    return Target(name, CPU_COMPILER, found[:count], round(memory * GIB))


def use_no_accelerator() -> None:
    """Keeps JAX from starting this machine's accelerator: no plan needs it, and a TPU serves one process."""
    jax.config.update("jax_platforms", "cpu")


def _prepare_libtpu() -> None:
    """Keeps libtpu from searching for TPUs, from warning that there are none, and from locking others out."""
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(name, value)


def _unknown(name: str) -> str:
    known = "; ".join(f"{chip}:{' '.join(c.topologies)}" for chip, c in CHIPS.items())
    return f"unknown --topology {name}; known are {known}"
