"""What every format of text gives: entries, each a text or what is wrong with it."""

from typing import NamedTuple

from mora_jax.errors import some

# The longest line of C4 has a million bytes. Parsed JSON may take thirty times its own length in memory.
MAX_BYTES = 16 * 2**20
TEXT_KEY = "text"


class Record(NamedTuple):
    """One entry of a shard: its text, None for a skipped bad one, and where in the shard it ends."""

    text: str | None
    position: int


class Entry(NamedTuple):
    """One line or row of a file, as its reader found it.

    Attributes:
      place: such as "line 3".
      text: its text, None for a bad entry.
      wrong: what is wrong with a bad entry.
      position: where in the file it ends, in bytes.
    """

    place: str
    text: str | None
    wrong: str
    position: int


def names(keys: list[str]) -> str:
    """Returns the keys or columns that there are, for a message; names may be long and many."""
    return f"it has {some([key[:40] for key in keys], 8) or 'none'}; --text-key names the one to read"
