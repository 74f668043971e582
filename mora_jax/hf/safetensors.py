"""safetensors files, read by rows and written tensor by tensor, on a disk or in a bucket.

A file holds the length of its header in eight bytes, the header, and the tensors, row-major and without gaps.
The header, in JSON, gives every tensor's type, shape and place. It is checked before memory is taken.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mora_jax.errors import InputError, some
from mora_jax.io import is_plain_file, parse_json, read_object, refuse_lfs_pointer

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

PYTORCH = {"format": "pt"}  # transformers requires this

_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": jnp.dtype(jnp.bfloat16)}
_HEADER_LIMIT = 1 << 24  # the header of a model of ten thousand tensors takes about 1 MB
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}", re.ASCII)


class Stored(NamedTuple):
    """A tensor in a file.

    Attributes:
      file: the file.
      dtype: the type of its numbers.
      shape: its shape.
      start: the position of its first byte in the file.
    """

    file: epath.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Returns the bytes that the tensor takes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def array(self) -> np.ndarray:
        """Reads the whole tensor, in its own type. Raises InputError as `rows` does."""
        return self._replace(shape=(1, *self.shape)).rows(0, 1)[0]

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Reads the rows from `start` to before `stop`, in the tensor's own type.

        Raises:
          InputError: if the file is shorter than its header says.
        """
        row = self.nbytes // self.shape[0]
        with self.file.open("rb") as stream:
            stream.seek(self.start + start * row)
            data = stream.read((stop - start) * row)
        if len(data) != (stop - start) * row:
            raise InputError(f"{self.file} is damaged: it ends within a tensor; download or export it again")
        return np.frombuffer(data, self.dtype).reshape(stop - start, *self.shape[1:])

    def equals(self, other: "Stored", rows: int = 4096) -> bool:
        """Returns whether two tensors hold the same numbers, comparing some rows at a time."""
        ends = [(start, min(start + rows, self.shape[0])) for start in range(0, self.shape[0], rows)]
        return self.shape == other.shape and all(
            np.array_equal(self.rows(*end), other.rows(*end)) for end in ends
        )


def read_headers(folder: epath.Path) -> dict[str, Stored]:
    """Returns every tensor of a folder, by name. Reads the headers only.

    Raises:
      InputError: if the folder holds no weights, the index names a file outside the folder, a file's size
        differs from what its header says, or a tensor is in two files or of a type that is not supported.
    """
    found: dict[str, Stored] = {}
    for file in weight_files(folder):
        if not file.exists():
            raise InputError(f"{file} is missing, though {INDEX} names it; download it too")
        header, _ = read_file(file)
        if shared := sorted(found.keys() & header.keys()):
            raise InputError(f"{file} holds {some(shared)}, which another file of the folder holds too")
        found |= header
    return found


def write_tensors(
    file: epath.Path,
    specs: Mapping[str, jax.ShapeDtypeStruct],
    tensors: Iterable[np.ndarray],
    metadata: Mapping[str, str] = PYTORCH,
) -> None:
    """Writes a file tensor by tensor; the host holds one tensor at a time.

    Args:
      file: the file to write.
      specs: shape and type of every tensor, by name, in the order of the file.
      tensors: their values, in the same order.
      metadata: what the header says of the file.

    Raises:
      InputError: for a type that is not supported.
    """
    codes = {dtype: code for code, dtype in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, spec in specs.items():
        dtype = np.dtype(spec.dtype)
        if dtype not in codes:
            raise InputError(f"{file}: {name!r} is of type {dtype}; only {', '.join(_DTYPES)} are supported")
        start, end = end, end + math.prod(spec.shape) * dtype.itemsize
        header[name] = {"dtype": codes[dtype], "shape": spec.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the tensors
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for spec, tensor in zip(specs.values(), tensors, strict=True):
            stream.write(np.ascontiguousarray(tensor, spec.dtype).tobytes())


def weight_files(folder: epath.Path) -> list[epath.Path]:
    """Returns the files of a folder's weights, which need not exist.

    Raises:
      InputError: if the folder holds no weights, or its index names a file outside the folder.
    """
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.exists():
        raise InputError(
            f"{folder} holds neither {WEIGHTS} nor {INDEX}; no other format is read. Pickles (.bin, .pt) "
            f'can run code and are never opened; to convert them: python -c "import transformers; '
            f"transformers.AutoModelForCausalLM.from_pretrained('{folder}').save_pretrained('OUT')\""
        )
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index}: weight_map must map the names of tensors to names of files")
    names = sorted(set(weight_map.values()))
    for name in names:
        if not _SHARD.fullmatch(name):
            raise InputError(f"{index}: weight_map names {name!r}, which is not a file of this folder")
    return [folder / name for name in names]


def read_file(file: epath.Path) -> tuple[dict[str, Stored], dict[str, Any]]:
    """Returns the tensors of a file by name, and its metadata. Reads the header only.

    Raises:
      InputError: if the file is missing, or its tensors do not fill it exactly.
    """
    if not file.exists():
        raise InputError(f"{file} is missing")
    if not is_plain_file(file):
        raise InputError(f"{file} is not a regular file")
    size = file.stat().length
    with file.open("rb") as stream:
        refuse_lfs_pointer(file, first := stream.read(64))
        length = int.from_bytes(first[:8], "little")
        stream.seek(8)
        if not 2 <= length <= min(_HEADER_LIMIT, size - 8):
            raise InputError(f"{file} is damaged or not a safetensors file: its header cannot be that long")
        header = parse_json(stream.read(length), f"the header of {file}")
    if not isinstance(header, dict):
        raise InputError(f"{file} is damaged or not a safetensors file: its header is not a JSON object")
    start = 8 + length
    tensors = {n: _stored(file, start, n, entry) for n, entry in header.items() if n != "__metadata__"}
    expected = start + sum(tensor.nbytes for tensor in tensors.values())
    if size != expected:
        raise InputError(
            f"{file} is damaged: it has {size} bytes, but its header describes {expected}; download or "
            f"export it again"
        )
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if tensor.start != end:
            raise InputError(f"{file} is damaged: {name!r} does not begin where the tensor before it ends")
        end += tensor.nbytes
    metadata = header.get("__metadata__")
    return tensors, metadata if isinstance(metadata, dict) else {}


def _stored(file: epath.Path, start: int, name: str, entry: Any) -> Stored:
    """Returns a tensor from its entry in the header; `start` is the end of the header in the file."""
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (fields.get(field) for field in ("dtype", "shape", "data_offsets"))
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**32 for n in shape):
        raise InputError(f"{file} is damaged: the header gives no valid shape for {name!r}")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise InputError(f"{file}: {name!r} is of type {dtype}; only {', '.join(_DTYPES)} are supported")
    if not isinstance(offsets, list) or [type(n) for n in offsets] != [int, int]:
        raise InputError(f"{file} is damaged: the header gives no valid data_offsets for {name!r}")
    stored = Stored(file, _DTYPES[dtype], tuple(shape), start + offsets[0])
    if offsets[1] - offsets[0] != stored.nbytes:
        raise InputError(f"{file} is damaged: data_offsets of {name!r} do not fit its shape {shape}")
    return stored
