"""Devices to plan for: TPUs or GPUs that a compiler knows, or simulated ones. None need be present."""

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
from train.runtime.gpus import memory_share

GIB = 2**30
CPU_COMPILER = "CPU compiler"
MOST_DEVICES = 4096  # simulated, or GPUs


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
class Gpu:
    """A type of GPU. Figures are those of XLA's own descriptions (xla/backends/gpu/target_config/specs).

    Attributes:
      name: the name that its driver gives.
      memory: bytes.
      bandwidth: bytes a second of its memory.
    """

    name: str
    memory: int
    bandwidth: int


GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", 84_942_979_072, 3_352_320_000_000),
    "h200": Gpu("NVIDIA H200", 151_397_597_184, 4_800_000_000_000),
}
# What the GPU compiler asks of a Hopper GPU, as text of XLA's GpuTargetConfigProto.
_HOPPER = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: 52428800
  memory_bandwidth: %(bandwidth)d device_memory_size: %(memory)d
  pcie_bandwidth: 34359738368 device_interconnect_info { active_links: 18 }
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  platform_version: "Compute Capability 9.0a" device_vendor: "NVIDIA Corporation" name: "%(name)s"
  device_address_bits: 64 ecc_enabled: true driver_version: "13.0.0" runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0" dnn_version: "9.20.0"
}
platform_name: "CUDA" device_description_str: "%(name)s"
dnn_version_info { major: 9 minor: 20 } runtime_version { major: 13 }
"""
_GPU_PLUGIN = "jax_cuda13_plugin"


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
    """Returns the number of devices of a topology such as "v5e:16x16" or "h100:8".

    Raises:
      InputError: for an unknown one.
    """
    kind, _, shape = name.partition(":")
    sides = shape.split("x")
    dimensions = (CHIPS[kind].dimensions,) if kind in CHIPS else (1, 2) if kind in GPUS else ()
    if len(sides) not in dimensions or not all(re.fullmatch(r"[1-9]\d*", side) for side in sides):
        raise InputError(_unknown(name))
    return math.prod(map(int, sides))


def of_gpus(name: str) -> bool:
    """Returns whether a topology is one of GPUs."""
    return name.partition(":")[0] in GPUS


def topology(name: str) -> Target:
    """Returns the devices of a topology such as "v5e:16x16" or "h100:8", of which none need be present.

    Raises:
      InputError: if the compiler is not installed, or does not know the topology.
    """
    return _gpus(name) if of_gpus(name) else _tpus(name)


def _gpus(name: str) -> Target:
    """Returns GPUs: "h100:8" of one machine, "h100:4x8" of four."""
    count, (kind, _, shape) = chips(name), name.partition(":")
    at_least("the number of GPUs of --topology", count, 1, MOST_DEVICES)
    if importlib.util.find_spec(_GPU_PLUGIN) is None:
        raise InputError(
            f"--topology {name} needs the GPU compiler: pip install 'mora_jax[cuda13]' (Linux x86-64, 3 GB; "
            "it needs no GPU)"
        )
    from importlib.metadata import version

    from jax.experimental import topologies

    gpu, each = GPUS[kind], int(shape.split("x")[-1])
    usable = memory_share(0.75) * gpu.memory  # before the plugin, which a bad share stops without a message
    layout = f"1x{count // each}x{each}"  # slices x machines x GPUs of one
    found = topologies.get_topology_desc(
        platform="cuda", topology_name=name, target_config=_HOPPER % dataclasses.asdict(gpu), topology=layout
    )
    compiler = f"GPU compiler (jax-cuda13-plugin {version('jax-cuda13-plugin')})"
    return Target(name, compiler, list(found.devices), round(usable))


def _tpus(name: str) -> Target:
    """Returns the TPUs of a topology."""
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
    at_least("--devices", count, 1, MOST_DEVICES)
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
    known = [f"{chip}:{' '.join(c.topologies)}" for chip, c in CHIPS.items()]
    known += [f"{gpu}:GPUS and {gpu}:MACHINESxGPUS" for gpu in GPUS]
    return f"unknown --topology {name}; known are {'; '.join(known)}"
