"""The two kinds of text that rows are made of: files, and data sets of TFDS."""

from collections.abc import Iterator
from typing import Protocol

from mora_jax.errors import InputError
from train.data.text.entries import TEXT_KEY, Record
from train.data.text.files import file_shards
from train.data.text.tfds import PREFIX, tfds_shards


class TextShard(Protocol):
    """A part of a source that one worker reads: a file, or a range of a TFDS split."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...

    def records(self, skip_lines: int) -> Iterator[Record]: ...

    def sha256(self) -> str: ...


def open_text(
    source: str, validation: str, tfds_data_dir: str = "", key: str = TEXT_KEY
) -> dict[str, list[TextShard]]:
    """Returns the shards of the splits "train" and "validation"; without a source, of the latter alone.

    Args:
      source: training text: a glob, a folder, a file (see `files.shards`) or `tfds:NAME`; empty for none.
      validation: validation text, likewise; empty for the validation split of a `tfds:` source.
      tfds_data_dir: folder in which `tfds:NAME` is looked up; empty for TFDS's default.
      key: the key, column or feature that holds the text.

    Raises:
      InputError: text is missing, cannot be read, or belongs to both splits.
    """
    if not validation and not source.startswith(PREFIX):
        raise InputError("--validation is missing; only a tfds: source has a validation split of its own")
    text = {"train": _shards(source, "train", tfds_data_dir, key)} if source else {}
    text |= {"validation": _shards(validation or source, "validation", tfds_data_dir, key)}
    both = [shard for shard in text.get("train", []) if shard in text["validation"]]
    if both:
        raise InputError(f"{both[0].name} is in the training and the validation text; name other files")
    return text


def _shards(source: str, split: str, tfds_data_dir: str, key: str) -> list[TextShard]:
    if source.startswith(PREFIX):
        return [*tfds_shards(source, split, tfds_data_dir, key)]
    return [*file_shards(source, key)]
