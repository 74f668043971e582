"""Parquet files: one text a row, in a column of strings."""

from collections.abc import Iterator

import pyarrow as pa
from etils import epath
from pyarrow import parquet

from mora_jax.errors import InputError, reason
from train.data.text.entries import MAX_BYTES, Entry, names

ROWS_AT_ONCE = 256
BUFFER_BYTES = 1 << 20


def entries(path: epath.Path, key: str) -> Iterator[Entry]:
    """Yields the rows of one file, in order; reads a few at a time, whatever the size of its row groups.

    Args:
      path: the file.
      key: the name of the column of text.

    Raises:
      InputError: the file is corrupt, has no such column, or a row is too long.
      OSError: the file cannot be read.
    """
    size, number = path.stat().length, 0
    try:
        with path.open("rb") as stream:
            file = parquet.ParquetFile(stream, buffer_size=BUFFER_BYTES, pre_buffer=False)
            _check_column(path, file.schema_arrow, key)
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=[key], use_threads=False):
                # As bytes, since Python raises for a whole batch if one text is not UTF-8.
                for value in batch.column(0).cast(pa.large_binary()).to_pylist():
                    number += 1
                    if value and len(value) > MAX_BYTES:
                        raise InputError(f"{path}: row {number} is longer than {MAX_BYTES >> 20} MiB")
                    yield Entry(
                        f"row {number}", *_decode(value, key), size * number // file.metadata.num_rows
                    )
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise InputError(
            f"{path} is not a valid Parquet file ({reason(error)}); download it again"
        ) from error


def _check_column(path: epath.Path, schema: pa.Schema, key: str) -> None:
    types = {field.name: field.type for field in schema}
    if key not in types:
        raise InputError(f"{path} has no column `{key}` ({names(list(types))})")
    kind = types[key].value_type if pa.types.is_dictionary(types[key]) else types[key]
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise InputError(f"{path}: its column `{key}` holds {types[key]}, not strings ({names(list(types))})")


def _decode(value: bytes | None, key: str) -> tuple[str | None, str]:
    """Returns the text of a row and "", or None and what is wrong with the row."""
    if value is None:
        return None, f"has no string `{key}`"
    try:
        return value.decode(), ""
    except UnicodeDecodeError:
        return None, f"has a `{key}` that is not UTF-8"
