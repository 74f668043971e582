"""Text from a prepared TFDS data set, such as `tfds:c4/en` or `tfds:/path/to/c4/en/3.1.0`."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import tensorflow_datasets as tfds
from etils import epath
from google.protobuf import json_format
from tensorflow_datasets.core.constants import DATA_DIR

from mora_jax.errors import InputError
from train.data.rows.description import INFO, check_description
from train.data.text.entries import TEXT_KEY, Record
from train.data.text.forms import TEXT

PREFIX = "tfds:"
READ_AT_ONCE = 256


@dataclass(frozen=True)
class TfdsShard:
    """Documents `start` to `stop` of one split. `size` and `Record.position` count documents."""

    directory: str
    split: str
    start: int
    stop: int
    key: str = TEXT_KEY

    @property
    def name(self) -> str:
        return f"{self.split}[{self.start}:{self.stop}]"

    @property
    def size(self) -> int:
        return self.stop - self.start

    def records(self, skip_lines: int) -> Iterator[Record]:
        """Yields the texts in order. `skip_lines` is not used: a TFDS data set has no bad lines."""
        del skip_lines
        rows = tfds.builder_from_directory(self.directory).as_data_source(self.name)  # pyright: ignore
        for first in range(0, self.size, READ_AT_ONCE):
            block = rows.__getitems__(range(first, min(first + READ_AT_ONCE, self.size)))
            for position, row in enumerate(block, start=first + 1):
                yield Record(_text(row[self.key], f"{self.directory} {self.name}", position), position)

    def sha256(self) -> str:
        """Returns the hash of the texts."""
        digest = hashlib.sha256()
        for record in self.records(0):
            text = str(record.content).encode()
            digest.update(len(text).to_bytes(8, "little") + text)
        return digest.hexdigest()


def tfds_shards(source: str, split: str, data_dir: str, key: str = TEXT_KEY) -> list[TfdsShard]:
    """Returns the shards of one split.

    Args:
      source: `tfds:NAME`, or `tfds:/a/prepared/directory`.
      split: name of the split.
      data_dir: folder in which `tfds:NAME` is looked up; empty for TFDS's default.
      key: the feature that holds the text.

    Raises:
      InputError: no such data set, split or feature, or files without random access.
    """
    builder = _builder(source, data_dir)
    if split not in builder.info.splits:
        raise InputError(
            f"{source} has no split {split!r}; it has {', '.join(builder.info.splits) or 'none'}"
        )
    features = builder.info.features
    found = list(features.keys()) if isinstance(features, tfds.features.FeaturesDict) else []
    if key not in found:
        raise InputError(f"{source} has no feature `{key}` ({TEXT.names(found)})")
    if builder.info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
        raise InputError(
            f"{source} is not stored as ArrayRecord, and other formats need TensorFlow; prepare it with "
            "file_format='array_record' (`tfds convert_format` converts one)"
        )
    ends = [0]
    for length in builder.info.splits[split].shard_lengths:
        ends.append(ends[-1] + length)
    return [TfdsShard(str(builder.data_path), split, a, b, key) for a, b in pairwise(ends) if b > a]


def _builder(source: str, data_dir: str) -> tfds.core.DatasetBuilder:
    name = source.removeprefix(PREFIX)
    if (epath.Path(name) / INFO).exists():
        return _from_directory(source, name)
    _check_prepared(epath.Path(data_dir or DATA_DIR) / re.split("[/:]", name)[0])
    try:
        builder = tfds.builder(name, data_dir=data_dir or None, try_gcs=False)
    except (tfds.core.DatasetNotFoundError, ValueError, ImportError, AssertionError) as error:
        raise InputError(f"{source} is not known to TFDS: {str(error).splitlines()[0]}") from error
    if not builder.info.splits:
        raise InputError(f"{source} is not prepared in {builder.data_dir}; prepare it there first")
    return builder


def _check_prepared(folder: epath.Path) -> None:
    """Checks every version prepared under one name, with a config or without: TFDS chooses among them."""
    for versions in ("*", "*/*"):
        for description in folder.glob(f"{versions}/{INFO}") if folder.is_dir() else ():
            check_description(description.parent)


def _from_directory(source: str, directory: str) -> tfds.core.DatasetBuilder:
    check_description(directory)
    try:
        return tfds.builder_from_directory(directory)
    except (ValueError, LookupError, TypeError, AttributeError, json_format.ParseError) as error:
        raise InputError(f"{source} is not a TFDS data set: {str(error).splitlines()[0]}") from error


def _text(value: bytes | str, source: str, position: int) -> str:
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        raise InputError(f"{source}: document {position} is not UTF-8 text") from error
