"""The weights of a Hugging Face folder: safetensors files, whose headers are read before memory is taken."""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
from etils import epath

from mora_jax.errors import InputError
from mora_jax.untrusted import is_plain_file, parse_json, read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

Shapes = dict[str, tuple[int, ...]]

_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": jnp.dtype(jnp.bfloat16)}
# The header of a model of ten thousand tensors has about a million bytes.
_HEADER_LIMIT = 1 << 24
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}", re.ASCII)


def read_headers(folder: epath.Path) -> dict[epath.Path, Shapes]:
    """The shape of every tensor, by the file that holds it.

    Raises:
      InputError: for a folder without weights, an index that names files elsewhere, a file whose size is not
        what its header says, and a tensor that is in two files or of a type that is not read.
    """
    headers: dict[epath.Path, Shapes] = {}
    for file in _weight_files(folder):
        header = _read_header(file)
        twice = {name for other in headers.values() for name in other.keys() & header.keys()}
        if twice:
            raise InputError(f"{file} holds {some(sorted(twice))}, which another file holds too")
        headers[file] = header
    return headers


def _weight_files(folder: epath.Path) -> list[epath.Path]:
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if not (folder / INDEX).exists():
        raise InputError(f"{folder} holds neither {WEIGHTS} nor {INDEX}; other formats are not read")
    weight_map = read_object(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{folder / INDEX}: weight_map must map names of tensors to names of files")
    names = sorted(set(weight_map.values()))
    for name in names:
        if not _SHARD.fullmatch(name):
            raise InputError(f"{folder / INDEX} names {name!r}, which is not a file of this folder")
    return [folder / name for name in names]


def _read_header(file: epath.Path) -> Shapes:
    """The shapes in a safetensors file, from its first bytes. Raises InputError unless its size fits them."""
    if not file.exists():
        raise InputError(f"{file} is missing: the index names it")
    if not is_plain_file(file):
        raise InputError(f"{file} is no plain file")
    size = file.stat().length
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(_HEADER_LIMIT, size - 8):
            raise InputError(f"{file} is damaged or no safetensors file: its header has no such length")
        header = parse_json(stream.read(length), f"the header of {file}")
    if not isinstance(header, dict):
        raise InputError(f"{file} is damaged or no safetensors file: its header is no mapping")
    tensors = {name: _stored(file, name, t) for name, t in header.items() if name != "__metadata__"}
    expected = 8 + length + sum(math.prod(shape) * dtype.itemsize for dtype, shape in tensors.values())
    if size != expected:
        raise InputError(f"{file} is damaged: it has {size} bytes, and by its header {expected}")
    return {name: shape for name, (_, shape) in tensors.items()}


def _stored(file: epath.Path, name: str, tensor: Any) -> tuple[np.dtype, tuple[int, ...]]:
    """The type and shape that a header gives of a tensor."""
    dtype, shape = (tensor.get("dtype"), tensor.get("shape")) if isinstance(tensor, dict) else (None, None)
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**32 for n in shape):
        raise InputError(f"{file} is damaged: {name!r} has no shape")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise InputError(f"{file}: {name} is {dtype}, not one of {', '.join(_DTYPES)}")
    return _DTYPES[dtype], tuple(shape)


def read_tensors(file: epath.Path, header: Shapes) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of one file, each let go of before the next. Raises InputError for a damaged file."""
    try:
        read = safetensors.deserialize(file.read_bytes())
    except safetensors.SafetensorError as error:
        raise InputError(f"{file} is damaged or no safetensors file: {error}") from error
    if {name: tuple(tensor["shape"]) for name, tensor in read} != header:
        raise InputError(f"{file} is damaged: its header can be read in two ways")
    while read:
        name, tensor = read.pop()
        yield name, np.frombuffer(tensor["data"], _DTYPES[tensor["dtype"]]).reshape(tensor["shape"])


def read_object(file: epath.Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises InputError if it is missing or anything else."""
    content = read_json(file)
    if not isinstance(content, dict):
        raise InputError(f"{file} must hold a JSON object")
    return content


def some(names: Sequence[str], limit: int = 3) -> str:
    """The first names of many, for a message."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
