"""What every format of text gives: entries, each an example or what is wrong with it."""

from typing import Any, NamedTuple

from mora_jax.errors import InputError

# The longest line of C4 has a million bytes. Parsed JSON may take thirty times its own length in memory.
MAX_BYTES = 16 * 2**20
TEXT_KEY = "text"

# A text; a prompt and its completion; or the messages of a conversation.
Content = str | tuple[str, ...] | list[dict[str, Any]]


class Record(NamedTuple):
    """One entry of a shard.

    Attributes:
      content: its example, None for a skipped bad one.
      position: where in the shard it ends.
      place: such as "a.jsonl: line 3", for messages.
      again: whether the entry was read before, and counted if it is bad.
    """

    content: Content | None
    position: int
    place: str = ""
    again: bool = False


class Entry(NamedTuple):
    """One line or row of a file, as its reader found it.

    Attributes:
      place: such as "line 3".
      content: its example, None for a bad entry.
      wrong: what is wrong with a bad entry.
      position: where in the file it ends, in bytes.
    """

    place: str
    content: Content | None
    wrong: str
    position: int


def bad_entry(place: str, wrong: str, skip_lines: int) -> InputError:
    """Returns the error of a bad entry too many, for example of "a.jsonl: line 3"."""
    return InputError(
        f"{place} {wrong}; fix it, or have mora prepare-data skip bad lines "
        f"with --skip-lines (now {skip_lines})"
    )
