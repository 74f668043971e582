"""The adapters of a model of one's own as one file: arrays as safetensors, methods as JSON in its header."""

import secrets
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mora_jax import transform, trees
from mora_jax.errors import InputError, some
from mora_jax.hf.safetensors import Stored, read_file, write_tensors
from mora_jax.io import json_text, parse_json, path_of
from mora_jax.state import State
from mora_jax.transform import Methods, Params

KEY, VERSION = "mora_jax", 1


def save(path: epath.PathLike, state: State) -> None:
    """Writes the trainable arrays, the methods and the step of a state to one file, or replaces the file.

    The frozen parameters are not in the file. A checksum of each adapted kernel is, since adapters are
    meaningless beside others: after a restart the kernels are no longer those that training began with, so
    keep the state's `params` too.

    Args:
      path: the file to write, such as `adapters.safetensors`.
      state: the state. Its arrays are read by this process.

    Raises:
      InputError: for an array of a type that safetensors does not have.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp
      >>> from mora_jax import MoRA, State, load, save
      >>> params = {"w": jnp.ones((4, 4))}
      >>> state = State.init(jax.random.key(0), params, [("w", MoRA(2))])
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save(f"{folder}/adapters.safetensors", state)
      ...     load(f"{folder}/adapters.safetensors", params).methods == state.methods
      True
    """
    path = path_of(path)
    whole = {"params": state.params, "adapters": state.adapters}
    trained = {f"params/{name}" for name in state.methods.trained()}
    arrays = {n: a for n, a in trees.flatten(whole).items() if n in trained or n.startswith("adapters/")}
    specs = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in arrays.items()}
    said = {
        "version": VERSION,
        "step": int(state.step),
        "methods": state.methods.to_json(),
        "kernels": _checksums(state.params, state.methods),
    }
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        write_tensors(partial, specs, (np.asarray(a) for a in arrays.values()), {KEY: json_text(said)})
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def load(path: epath.PathLike, params: Params) -> State:
    """Returns the state that `save` wrote, on top of the given parameters.

    Args:
      path: the file.
      params: the parameters beside which the adapters were saved. Those that were trained themselves take the
        saved values.

    Raises:
      InputError: if the file is none of `save`, is damaged, or does not fit the parameters: other paths or
        shapes, or adapted kernels of other values.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp
      >>> from mora_jax import LoRA, State, load, save
      >>> params = {"w": jnp.ones((4, 4))}
      >>> state = State.init(jax.random.key(0), params, [("w", LoRA(1))])
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save(f"{folder}/adapters.safetensors", state)
      ...     again = load(f"{folder}/adapters.safetensors", params)
      >>> bool(jnp.all(again.adapters["w"]["a_KR"] == state.adapters["w"]["a_KR"]))
      True
    """
    file = path_of(path)
    tensors, metadata = read_file(file)
    said = parse_json(metadata.get(KEY, "null"), f"the metadata of {file}")
    if not isinstance(said, dict) or said.get("version") != VERSION:
        raise InputError(f"{file} holds no adapters that mora_jax.save of this version wrote")
    try:
        methods, kernels, step = Methods.from_json(said["methods"]), dict(said["kernels"]), int(said["step"])
    except (AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
        raise InputError(f"{file} is damaged: its metadata says no methods: {error}") from error
    flat = trees.flatten(params)
    if other := sorted(flat.keys() ^ dict(methods.choices).keys()):
        raise InputError(f"{file} was saved beside other parameters: they differ in {some(other)}")
    if other := [path for path, sum in _checksums(params, methods).items() if kernels.get(path) != sum]:
        raise InputError(
            f"{file} was saved beside other values of {some(other)}; after a restart the kernels are no "
            f"longer those that training began with"
        )
    expected = {f"params/{path}": flat[path] for path in methods.trained()}
    shapes = jax.eval_shape(lambda: transform.attach(jax.random.key(0), params, methods))
    expected |= {f"adapters/{path}": shape for path, shape in trees.flatten(shapes).items()}
    if other := _differing(expected, tensors):
        raise InputError(f"{file} was saved beside other parameters: they differ in {some(other)}")
    arrays = {name: jnp.asarray(tensors[name].array()) for name in expected}
    trained = {path: arrays[f"params/{path}"].astype(flat[path].dtype) for path in methods.trained()}
    adapters = trees.unflatten({n: a for n, a in arrays.items() if n.startswith("adapters/")})
    return State(trees.replaced(params, trained), adapters.get("adapters", {}), methods, jnp.int32(step))


def _checksums(params: Params, methods: Methods) -> dict[str, int]:
    """Returns a checksum of every adapted kernel's bytes."""
    flat = trees.flatten(params)
    return {path: zlib.crc32(np.ascontiguousarray(flat[path]).tobytes()) for path, _ in methods.kernels()}


def _differing(expected: Mapping[str, Any], found: Mapping[str, Stored]) -> list[str]:
    """Returns the names that only one has, or with another shape."""
    both = expected.keys() & found.keys()
    other = [name for name in both if tuple(expected[name].shape) != found[name].shape]
    return sorted((expected.keys() ^ found.keys()) | set(other))
