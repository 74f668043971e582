"""Parts of text by the hash of each example: a validation share, and how often a source is read."""

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
    """Some of the examples of a shard. The hash of each decides, so equal ones are treated alike.

    Attributes:
      shard: the shard.
      held_out: the fraction that is validation text.
      validation: whether these are those of validation text, or the others.
      taken: the fraction that is taken of these.
      first: whether bad lines are among these.
    """

    shard: TextShard
    held_out: float = 0.0
    validation: bool = False
    taken: float = 1.0
    first: bool = True

    @property
    def name(self) -> str:
        return self.shard.name if self.taken == 1 else f"{self.taken:g} of {self.shard.name}"

    @property
    def size(self) -> int:
        return self.shard.size

    def records(self, skip_lines: int) -> Iterator[Record]:
        """Yields the records of this part."""
        again = not (self.first or self.validation)
        for record in self.shard.records(skip_lines):
            if self.first if record.content is None else self._has(record.content):
                yield record._replace(again=again)

    def sha256(self) -> str:
        """Returns the hash of the shard."""
        return self.shard.sha256()

    def _has(self, content: Content) -> bool:
        if (_fraction(content, b"split") < self.held_out) != self.validation:
            return False
        return self.taken == 1 or _fraction(content, b"mixture") < self.taken


def repeated(shard: TextShard, times: float, held_out: float) -> list[TextShard]:
    """Returns what reads the training examples of a shard so often: 2.5 reads half of them once more.

    Each time is a shard of its own, so that copies of an example are in other rows.
    """
    found = []
    while times > 0:
        part = Share(shard, held_out, taken=min(1.0, times), first=not found)
        found.append(shard if part == Share(shard) else part)
        times = round(times - 1, 9)
    return found


def _fraction(content: Content, purpose: bytes) -> float:
    """Returns a number in [0, 1) that depends on an example and a purpose alone."""
    text = content if isinstance(content, str) else json.dumps(content, sort_keys=True)
    digest = hashlib.blake2b(text.encode(), digest_size=6, person=purpose).digest()
    return int.from_bytes(digest, "big") / 2**48
