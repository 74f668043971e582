"""The mesh and what lies on it, outside jit: shardings of trees, batches and assembled arrays."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mora_jax.errors import InputError
from mora_jax.sharding.rules import AXES, BATCH, Box, Rules, spec_at


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh with the axes `AXES`, whose neighbours along `tensor`, then `fsdp`, are close.

    Over several slices of TPUs, `data` spans the slices as far as it divides, and `fsdp` next. Other devices
    are taken in their order, by host.

    Args:
      data: replicas of the state.
      fsdp: devices that one replica of the state is divided over.
      tensor: devices that share the heads and the MLP's width of one token.
      devices: devices to use; all by default. One size may be -1: all devices that are left.

    Raises:
      InputError: if the sizes do not fit the devices.
    """
    here = jax.devices() if devices is None else list(devices)
    sizes = _filled({"data": data, "fsdp": fsdp, "tensor": tensor}, len(here))
    needed = math.prod(sizes.values())
    if needed > len(here):
        asked = ", ".join(f"mesh.{axis} {size}" for axis, size in sizes.items() if size > 1)
        raise InputError(f"{asked} needs {needed} devices; {len(here)} ({here[0].platform}) are here")
    if needed < len(here) and len({device.process_index for device in here}) > 1:
        raise InputError(
            f"the mesh has {needed} of {len(here)} devices; across processes it must have all of them"
        )
    return Mesh(_laid_out(tuple(sizes.values()), here[:needed]), AXES, axis_types=(AxisType.Auto,) * 3)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array replicated on every device."""
    return NamedSharding(mesh, P())


def batch(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its first axis divided over `data` and `fsdp`."""
    return NamedSharding(mesh, P(BATCH))


def shardings(tree: Any, mesh: Mesh, rules: Rules) -> Any:
    """Returns the sharding of every leaf of a tree of arrays or shapes, by its path.

    Raises:
      InputError: if no rule covers a path, or no axis divides that may be divided.
    """

    def place(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, spec_at(name, leaf.shape, mesh.shape, rules))

    return jax.tree_util.tree_map_with_path(place, tree)


def assembled(
    place: NamedSharding,
    shape: Sequence[int],
    fill: Callable[[Mapping[Box, np.ndarray]], None],
    dtype: np.dtype = np.dtype(np.float32),  # noqa: B008 (immutable)
) -> jax.Array:
    """Returns an array of which no process makes more than its devices hold.

    Args:
      place: how the array is divided.
      shape: shape of the global array.
      fill: writes the shards of this process's devices into their buffers.
      dtype: its type.
    """
    indices = place.addressable_devices_indices_map(tuple(shape))
    boxes = {
        device: tuple(part.indices(n)[:2] for part, n in zip(index or (), shape, strict=True))
        for device, index in indices.items()
    }
    parts = {box: np.empty([stop - start for start, stop in box], dtype) for box in boxes.values()}
    fill(parts)
    held = [jax.device_put(parts[box], device) for device, box in boxes.items()]
    return jax.make_array_from_single_device_arrays(tuple(shape), place, held)


def local_rows(mesh: Mesh, rows: int) -> np.ndarray:
    """Returns which rows of a global batch this process's devices hold, in order."""
    parts = batch(mesh).addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[part] for part in parts]))


def to_global(mesh: Mesh, rows: int, local: Any) -> Any:
    """Returns a tree of arrays, one row a sequence, as global arrays, given this process's `local_rows`."""
    held = local_rows(mesh, rows)

    def make(part: np.ndarray) -> jax.Array:
        def of(index: Any) -> np.ndarray:
            return part[np.searchsorted(held, np.arange(rows)[index[0]])]

        return jax.make_array_from_callback((rows, *part.shape[1:]), batch(mesh), of)

    return jax.tree.map(make, local)


def _filled(sizes: dict[str, int], devices: int) -> dict[str, int]:
    """Returns the sizes, with -1 replaced by the number of devices that are left."""
    known = math.prod(size for size in sizes.values() if size != -1)
    for axis, size in sizes.items():
        if size == -1:
            if devices % known:
                raise InputError(
                    f"mesh.{axis} -1: {devices} devices do not divide by the other axes' {known}"
                )
            return sizes | {axis: devices // known}
    return sizes


def _laid_out(shape: tuple[int, ...], devices: list[Any]) -> np.ndarray:
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if devices[0].platform != "tpu":
        return np.array(devices).reshape(shape)
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    between, within, left = [], [], slices
    for size in shape:
        between.append(math.gcd(size, left))
        within.append(size // between[-1])
        left //= between[-1]
    if left > 1:
        raise InputError(f"a mesh of {len(devices)} devices does not divide into {slices} slices of TPUs")
    return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
