"""Parquet files: one example a row, in columns of strings, or in one of messages."""

from collections.abc import Iterator

import pyarrow as pa
from etils import epath
from pyarrow import parquet

from mora_jax.errors import InputError, reason
from train.data.text.entries import MAX_BYTES, Entry
from train.data.text.forms import Form

ROWS_AT_ONCE = 256
BUFFER_BYTES = 1 << 20


def entries(path: epath.Path, form: Form) -> Iterator[Entry]:
    """Yields the rows of one file, in order; reads a few at a time, whatever the size of its row groups.

    Args:
      path: the file.
      form: which columns hold what.

    Raises:
      InputError: the file is corrupt, has no such column, or a row is too long.
      OSError: the file cannot be read.
    """
    size, number = path.stat().length, 0
    try:
        with path.open("rb") as stream:
            file = parquet.ParquetFile(stream, buffer_size=BUFFER_BYTES, pre_buffer=False)
            for key in form.keys:
                _check_column(path, file.schema_arrow, key, form)
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=list(form.keys), use_threads=False):
                for values in zip(*(_values(batch.column(key)) for key in form.keys), strict=True):
                    number += 1
                    if any(isinstance(value, bytes) and len(value) > MAX_BYTES for value in values):
                        raise InputError(f"{path}: row {number} is longer than {MAX_BYTES >> 20} MiB")
                    row, wrong = _decode(dict(zip(form.keys, values, strict=True)))
                    found = (None, wrong) if wrong else form.content(row)
                    yield Entry(f"row {number}", *found, size * number // file.metadata.num_rows)
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise InputError(
            f"{path} is not a valid Parquet file ({reason(error)}); download it again"
        ) from error


def _check_column(path: epath.Path, schema: pa.Schema, key: str, form: Form) -> None:
    types = {field.name: field.type for field in schema}
    if key not in types:
        raise InputError(f"{path} has no column `{key}` ({form.names(list(types))})")
    right, wanted = (_is_text, "strings") if form.name != "messages" else (_is_list, "lists of messages")
    if not right(types[key]):
        there = form.names(list(types))
        raise InputError(f"{path}: its column `{key}` holds {types[key]}, not {wanted} ({there})")


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_list(kind: pa.DataType) -> bool:
    return (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_struct(kind.value_type)


def _values(column: pa.Array) -> list:
    """Returns the values of a column: text as bytes, as Python raises for all of them if one is not UTF-8."""
    return (column.cast(pa.large_binary()) if _is_text(column.type) else column).to_pylist()


def _decode(row: dict) -> tuple[dict, str]:
    """Returns a row with its bytes as text, and what is wrong with it."""
    for key, value in row.items():
        if isinstance(value, bytes):
            try:
                row[key] = value.decode()
            except UnicodeDecodeError:
                return row, f"has a `{key}` that is not UTF-8"
    return row, ""
