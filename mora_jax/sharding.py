"""How arrays lie on devices: one mesh of three axes, one table of rules, and constraints for the model.

The axes of the mesh: `data` copies the state and divides the batch, `fsdp` divides both, `tensor` divides
heads and the MLP's width. The library sees a mesh only as the ambient one (`jax.set_mesh`); without one, or
with a mesh of other axes, nothing here does anything.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mora_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
STATE = ("fsdp", "tensor")

Sizes: TypeAlias = Mapping[str, int]
Rules: TypeAlias = Sequence[tuple[str, tuple[P, ...]]]
# A part of an array: of each axis the first index and the last one, exclusive.
Box: TypeAlias = tuple[tuple[int, int], ...]

# Kernels whose outputs are divided over `tensor`, and those whose inputs are.
_COLUMNS = (P("fsdp", "tensor"), P(STATE, None))
_ROWS = (P("tensor", "fsdp"), P(None, STATE))

# (regex of the end of a path, specs): the first regex that matches counts, and of its specs the first whose
# axes all divide. Specs speak of the last axes of an array: leading ones, stacked layers, are never divided.
# Optimizer state lies at the path of its parameter, behind a prefix. Uneven shards are refused by JAX, and a
# width such as 5461 has no divisors of use: hence the second choices. Vectors are small, and whole.
RULES: Rules = (
    ("embed_tokens/embedding", _ROWS),
    ("lm_head/kernel", _COLUMNS),
    ("layers/(self_attn/[qkv]|mlp/(gate|up))_proj/kernel", _COLUMNS),
    ("layers/(self_attn/o|mlp/down)_proj/kernel", _ROWS),
    ("(.*_|.*/|)norm/scale|.*layernorm/scale", (P(),)),
    ("m_RR", (P("fsdp", "tensor"), P(STATE, None))),
    ("a_KR", (P(STATE, None), P("fsdp", "tensor"), P("tensor", "fsdp"))),
    ("b_RD", (P(None, STATE), P("tensor", "fsdp"), P("fsdp", "tensor"))),
    ("magnitude_D", (P(),)),
    ("guard/[a-z_]*W", (P(),)),
    ("activations/residual", (P(BATCH, None, None),)),
    ("activations/heads", (P(BATCH, None, "tensor", None),)),
    ("activations/mlp", (P(BATCH, None, "tensor"), P(BATCH, None, None))),
    ("activations/tokens", (P(BATCH, None),)),
    ("activations/logits", (P(BATCH, "tensor"), P(BATCH, None))),
    ("activations/head_gradients", (P(BATCH, None, "tensor"), P(BATCH, None, None))),
)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of the axes `AXES`, whose neighbours along `tensor`, then `fsdp`, are near each other.

    Over several slices of TPUs `data` goes between the slices as far as it divides, and `fsdp` next. Other
    devices are taken in their order, by host.

    Args:
      data: copies of the state.
      fsdp: devices that one copy of the state is divided over.
      tensor: devices that share the heads and the MLP's width of one token.
      devices: those to use; all by default. One size may be -1: as many as are left.

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
    """Whole on every device."""
    return NamedSharding(mesh, P())


def batch(mesh: Mesh) -> NamedSharding:
    """The first axis divided over `data` and `fsdp`."""
    return NamedSharding(mesh, P(BATCH))


def batch_shards(mesh: Any = None) -> int:
    """Into how many parts a batch is divided by a mesh, or by the ambient one."""
    sizes = _ambient() if mesh is None else mesh.shape
    return math.prod(sizes[axis] for axis in BATCH) if sizes else 1


def shardings(tree: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """The sharding of every leaf of a tree of arrays or shapes, by its path.

    Raises:
      InputError: if no rule covers a path, or no axis divides that may be divided.
    """

    def place(path: Any, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, spec(_name(path), leaf.shape, mesh.shape, rules))

    return jax.tree_util.tree_map_with_path(place, tree)


def spec(name: str, shape: Sequence[int], sizes: Sizes, rules: Rules = RULES) -> P:
    """How an array is divided by a mesh of the given sizes; scalars are whole.

    Raises:
      InputError: if no rule covers the path, or no axis divides that may be divided.
    """
    if not shape:
        return P()
    choices = _choices(name, rules)
    for choice in choices:
        if _divides(choice, shape, sizes):
            return _canonical(choice, len(shape), sizes)
    by = ", ".join(f"mesh.{axis} {sizes[axis]}" for axis in AXES if sizes[axis] > 1)
    hint = "method.align 128 makes it divisible" if name.endswith("m_RR") else "use sizes that divide one"
    raise InputError(f"{by}: no axis of {name} {tuple(shape)} can be divided so; {hint}")


def assembled(
    name: str, shape: Sequence[int], mesh: Mesh, fill: Callable[[Mapping[Box, np.ndarray]], None]
) -> jax.Array:
    """A float32 array laid out by the rules for its path, of which no process makes more than it holds.

    Args:
      name: its path.
      shape: of the whole array.
      mesh: the devices.
      fill: writes the parts that this process's devices hold into their buffers.
    """
    place = NamedSharding(mesh, spec(name, shape, mesh.shape))
    indices = place.addressable_devices_indices_map(tuple(shape))
    boxes = {
        device: tuple(part.indices(n)[:2] for part, n in zip(index or (), shape, strict=True))
        for device, index in indices.items()
    }
    parts = {box: np.empty([stop - start for start, stop in box], np.float32) for box in boxes.values()}
    fill(parts)
    held = [jax.device_put(parts[box], device) for device, box in boxes.items()]
    return jax.make_array_from_single_device_arrays(tuple(shape), place, held)


def pin(tree: Any) -> Any:
    """Inside jit: every leaf of a tree laid out by the rules for its path."""
    sizes = _ambient()
    if not sizes:
        return tree

    def constrain_leaf(path: Any, x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, spec(_name(path), x.shape, sizes))

    return jax.tree_util.tree_map_with_path(constrain_leaf, tree)


def constrain(x: jax.Array, name: str) -> jax.Array:
    """Inside jit: an activation laid out by the rule of its name; left alone where that does not divide."""
    sizes = _ambient()
    for choice in _choices(name, RULES) if sizes else ():
        if _divides(choice, x.shape, sizes):
            return jax.lax.with_sharding_constraint(x, _canonical(choice, x.ndim, sizes))
    return x


def by_device(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Inside jit: a function that each device applies to its own parts of arrays, by the rule of a name."""
    sizes = _ambient()
    if not sizes:
        return function
    layout = _canonical(_choices(name, RULES)[0], 0, sizes)
    return jax.shard_map(function, in_specs=layout, out_specs=layout, check_vma=False)


def whole(x: jax.Array) -> jax.Array:
    """Inside jit: an activation (batch, ..., width) divided along its batch alone."""
    sizes = _ambient()
    if not sizes or x.shape[0] % math.prod(sizes[axis] for axis in BATCH):
        return x
    return jax.lax.with_sharding_constraint(x, _canonical(P(BATCH), 1, sizes))


def undivided(x: jax.Array) -> jax.Array:
    """Inside jit: the same whole array on every device."""
    return jax.lax.with_sharding_constraint(x, P()) if _ambient() else x


def gathered(w: jax.Array, name: str) -> jax.Array:
    """Inside jit: a parameter's or adapter's array as products need it, no longer divided over `fsdp`.

    The array is gathered in the type that it has here. Its gradient goes back to where the array lies.
    """
    return _gathered(w, name) if _ambient() else w


def scattered(g: jax.Array, name: str) -> jax.Array:
    """Inside jit: a gradient as the optimizer needs it, back where its array lies.

    It is added up as a whole first: asked for the parts alone, XLA would rather move the activations.
    """
    sizes = _ambient()
    if not sizes:
        return g
    for layout in (_used(name, g.shape, sizes), spec(name, g.shape, sizes)):
        g = jax.lax.with_sharding_constraint(g, layout)
    return g


def in_use() -> bool:
    """Whether there is an ambient mesh of ours with more than one device."""
    return bool(_ambient())


def divides_products() -> bool:
    """Whether kernels are divided along their widths, so that joining them would move them about."""
    sizes = _ambient()
    return bool(sizes) and sizes["tensor"] > 1


def tile(width: int, whole: int) -> int:
    """The tiles that a width is padded to: none where `tensor` divides it."""
    sizes = _ambient()
    return 1 if sizes and sizes["tensor"] > 1 and width % sizes["tensor"] == 0 else whole


def gathers() -> bool:
    """Whether parameters are gathered for their use, so that the gathered ones should not be kept."""
    sizes = _ambient()
    return bool(sizes) and sizes["fsdp"] > 1


def local_rows(mesh: Mesh, rows: int) -> np.ndarray:
    """Which rows of a global batch this process's devices hold, in order."""
    parts = batch(mesh).addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[part] for part in parts]))


def to_global(mesh: Mesh, rows: int, *local: np.ndarray) -> tuple[jax.Array, ...]:
    """Global batches out of what each process holds of them, its `local_rows`."""
    held = local_rows(mesh, rows)

    def make(part: np.ndarray) -> jax.Array:
        def of(index: Any) -> np.ndarray:
            return part[np.searchsorted(held, np.arange(rows)[index[0]])]

        return jax.make_array_from_callback((rows, *part.shape[1:]), batch(mesh), of)

    return tuple(make(part) for part in local)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(w: jax.Array, name: str) -> jax.Array:
    sizes = _ambient()
    for layout in (spec(name, w.shape, sizes), _used(name, w.shape, sizes)):
        w = jax.lax.with_sharding_constraint(w, layout)
    return w


def _gathered_forward(w: jax.Array, name: str) -> tuple[jax.Array, None]:
    return _gathered(w, name), None


def _gathered_backward(name: str, _: None, g: jax.Array) -> tuple[jax.Array]:
    return (scattered(g, name),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def _used(name: str, shape: Sequence[int], sizes: Sizes) -> P:
    """Kernels keep what they have along `tensor`; adapters, small, are whole."""
    choice = _choices(name, RULES)[0]
    if not name.endswith(("kernel", "embedding")):
        return P()
    choice = P(*(axis if axis == "tensor" else None for axis in choice))
    return _canonical(choice, len(shape), sizes) if _divides(choice, shape, sizes) else P()


def _ambient() -> Sizes:
    """The sizes of the ambient mesh's axes; empty where it is none of ours or its axes are not automatic."""
    mesh = jax.sharding.get_abstract_mesh()
    ours = not mesh.empty and set(AXES) <= set(mesh.auto_axes)
    return mesh.shape if ours and mesh.size > 1 else {}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


@functools.cache
def _choices(name: str, rules: Rules) -> tuple[P, ...]:
    for regex, choices in rules:
        if re.fullmatch(f"(.*/)?({regex})", name):
            return choices
    raise InputError(f"no rule of mora_jax.sharding.RULES covers {name!r}")


def _divides(choice: P, shape: Sequence[int], sizes: Sizes) -> bool:
    if len(choice) > len(shape):
        return False
    widths = shape[len(shape) - len(choice) :]
    return all(width % _parts(axis, sizes) == 0 for width, axis in zip(widths, choice, strict=True))


def _parts(axis: Any, sizes: Sizes) -> int:
    names = axis if isinstance(axis, tuple) else (axis,)
    return math.prod(sizes[name] for name in names if name)


def _canonical(choice: P, ndim: int, sizes: Sizes) -> P:
    """For all axes of an array, without what divides by one: equal layouts have equal specs."""
    entries: list[Any] = [None] * (ndim - len(choice))
    for axis in choice:
        names = tuple(n for n in (axis if isinstance(axis, tuple) else (axis,)) if n and sizes[n] > 1)
        entries.append(names if len(names) > 1 else names[0] if names else None)
    while entries and entries[-1] is None:
        entries.pop()
    return P(*entries)


def _filled(sizes: dict[str, int], devices: int) -> dict[str, int]:
    """The sizes with the one that is -1 made what is left."""
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
