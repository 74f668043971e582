"""A validation share of the training text: each example belongs to the split that its hash says."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from train.data.text.entries import Content, Record


class TextShard(Protocol):
    """A part of a source that one worker reads: a file, or a range of a TFDS split."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...

    def records(self, skip_lines: int) -> Iterator[Record]: ...

    def sha256(self) -> str: ...


@dataclass(frozen=True)
class Share:
    """The examples of a shard that belong to one split. Equal examples belong to the same one.

    Attributes:
      shard: the shard.
      share: the fraction of validation examples.
      validation: whether these are those. Bad lines belong to the training examples.
    """

    shard: TextShard
    share: float
    validation: bool

    @property
    def name(self) -> str:
        return self.shard.name

    @property
    def size(self) -> int:
        return self.shard.size

    def records(self, skip_lines: int) -> Iterator[Record]:
        """Yields the records of this split."""
        for record in self.shard.records(skip_lines):
            held_out = record.content is not None and _fraction(record.content) < self.share
            if held_out == self.validation:
                yield record

    def sha256(self) -> str:
        """Returns the hash of the shard."""
        return self.shard.sha256()


def _fraction(content: Content) -> float:
    """Returns a number in [0, 1) that depends on an example alone."""
    text = content if isinstance(content, str) else json.dumps(content, sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big") / 2**48
