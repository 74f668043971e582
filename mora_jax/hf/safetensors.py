"""The weights of a Hugging Face folder: safetensors files, of which no more is read or held than is needed.

A file is the length of its header in eight bytes, the header, and the tensors, row by row, without gaps. The
header, in JSON, gives each tensor's type, shape and place. It is checked before memory is taken.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath

from mora_jax.errors import InputError, some
from mora_jax.io import is_plain_file, parse_json, read_object

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Stored(NamedTuple):
    """A tensor that lies in a file.

    Attributes:
      file: that holds it.
      dtype: of its numbers.
      shape: of the tensor.
      start: where in the file its first byte is.
    """

    file: epath.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """The bytes that it takes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Its rows from `start` to before `stop`, along the first axis, in its own type.

        Raises:
          InputError: if the file has become shorter.
        """
        row = self.nbytes // self.shape[0]
        with self.file.open("rb") as stream:
            stream.seek(self.start + start * row)
            data = stream.read((stop - start) * row)
        if len(data) != (stop - start) * row:
            raise InputError(f"{self.file} is damaged: it ends before all its tensors are read")
        return np.frombuffer(data, self.dtype).reshape(stop - start, *self.shape[1:])


_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": jnp.dtype(jnp.bfloat16)}
# The header of a model of ten thousand tensors has about a million bytes.
_HEADER_LIMIT = 1 << 24
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}", re.ASCII)


def read_headers(folder: epath.Path) -> dict[str, Stored]:
    """Every tensor of a folder, by its name; nothing but headers is read.

    Raises:
      InputError: for a folder without weights, an index that names files elsewhere, a file whose size is not
        what its header says, and a tensor that is in two files or of a type that is not read.
    """
    found: dict[str, Stored] = {}
    for file in _weight_files(folder):
        header = _read_header(file)
        if twice := sorted(found.keys() & header.keys()):
            raise InputError(f"{file} holds {some(twice)}, which another file holds too")
        found |= header
    return found


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


def _read_header(file: epath.Path) -> dict[str, Stored]:
    """The tensors in a file, from its first bytes. Raises InputError unless they are all that it holds."""
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
    tensors = {n: _stored(file, 8 + length, n, t) for n, t in header.items() if n != "__metadata__"}
    expected = 8 + length + sum(tensor.nbytes for tensor in tensors.values())
    if size != expected:
        raise InputError(f"{file} is damaged: it has {size} bytes, and by its header {expected}")
    _check_side_by_side(file, 8 + length, tensors)
    return tensors


def _stored(file: epath.Path, data: int, name: str, tensor: Any) -> Stored:
    """A tensor as a header gives it; `data` is where the tensors begin in the file."""
    fields = tensor if isinstance(tensor, dict) else {}
    dtype, shape, offsets = (fields.get(field) for field in ("dtype", "shape", "data_offsets"))
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**32 for n in shape):
        raise InputError(f"{file} is damaged: {name!r} has no shape")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise InputError(f"{file}: {name} is {dtype}, not one of {', '.join(_DTYPES)}")
    if not isinstance(offsets, list) or [type(n) for n in offsets] != [int, int]:
        raise InputError(f"{file} is damaged: {name!r} has no place")
    stored = Stored(file, _DTYPES[dtype], tuple(shape), data + offsets[0])
    if offsets[1] - offsets[0] != stored.nbytes:
        raise InputError(f"{file} is damaged: {name!r} has not as many bytes as its shape")
    return stored


def _check_side_by_side(file: epath.Path, data: int, tensors: Mapping[str, Stored]) -> None:
    """Raises InputError unless the tensors fill what follows the header, without gaps or overlaps."""
    end = data
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if tensor.start != end:
            raise InputError(f"{file} is damaged: {name!r} does not begin where the tensor before it ends")
        end += tensor.nbytes


def write_tensors(
    file: epath.Path, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype, tensors: Iterable[np.ndarray]
) -> None:
    """Writes a file tensor by tensor, so that one of them is held at a time.

    Args:
      file: to write.
      shapes: of all tensors, by their names, in order.
      dtype: of all of them.
      tensors: their values, in the same order.
    """
    code = next(name for name, known in _DTYPES.items() if known == dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # which transformers asks for
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # numbers of any type begin at a multiple of their size
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            stream.write(np.ascontiguousarray(tensor, dtype).tobytes())
