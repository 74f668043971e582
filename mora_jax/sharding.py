"""How arrays lie on devices: batches are divided over the axis `data`, everything else is whole on each."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mora_jax.errors import InputError


def make_mesh(data: int, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over `data` devices, or over all with -1, of those given or of those that are here.

    Raises:
      InputError: if there are fewer devices.
    """
    devices = jax.devices() if devices is None else devices
    if data > len(devices):
        raise InputError(
            f"mesh.data asks for {data} devices; {len(devices)} ({devices[0].platform}) are here"
        )
    used = len(devices) if data == -1 else data
    return Mesh(np.array(devices[:used]), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch(mesh: Mesh) -> NamedSharding:
    """The first axis divided over `data`."""
    return NamedSharding(mesh, PartitionSpec("data"))
