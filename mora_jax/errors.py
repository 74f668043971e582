"""The one exception for input that the user can correct, and the phrases its messages share."""

import contextlib
import difflib
import errno
import os
from collections.abc import Iterable, Iterator, Sequence


def spelled_out(text: str) -> str:
    """Returns the text as one printable line: line ends and control characters become escapes.

    >>> spelled_out("a\\nb")
    'a\\\\nb'
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def some(items: Sequence[str], limit: int = 3) -> str:
    """Returns the first items of a list for a message, and how many more there are.

    >>> some(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Returns a hint at the known word nearest to `word`, or an empty string if none is near.

    >>> nearest("ranq", ["rank", "alpha"])
    '; did you mean rank?'
    """
    near = difflib.get_close_matches(word, sorted(known), n=1, cutoff=cutoff)
    return f"; did you mean {near[0]}?" if near else ""


def reason(error: BaseException) -> str:
    """Returns what an exception says, as one line: the system's words for an OSError, else its message."""
    words = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, FileNotFoundError) and " " not in words:  # packages for buckets say the file's name
        return os.strerror(errno.ENOENT)
    return words


# The largest float32, and the smallest that devices do not round to zero.
_FLOAT32_MOST, _FLOAT32_LEAST = 3.4028234e38, 1.1754944e-38


def check_float32(name: str, value: float) -> None:
    """Raises InputError for a number that is infinite in float32, or zero there but not as it is written."""
    if abs(value) > _FLOAT32_MOST:
        raise InputError(f"{name} {value} is infinite in float32; choose a smaller number")
    if 0 < abs(value) < _FLOAT32_LEAST:
        raise InputError(f"{name} {value} is zero in float32; choose a larger number, at least 1.2e-38")


class InputError(ValueError):
    """Bad input. The message is one line that names what is wrong and how to correct it.

    The command line prints the line and exits with a non-zero status. Messages may quote files, so control
    characters are escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(spelled_out(message))


@contextlib.contextmanager
def located(place: str, option: str = "") -> Iterator[None]:
    """Says in the message of an InputError where it belongs. A place that it names already is not repeated.

    >>> with located("a.yaml"):
    ...     raise InputError("steps must be positive")
    Traceback (most recent call last):
    mora_jax.errors.InputError: a.yaml: steps must be positive
    >>> with located("model", "--init-from"):
    ...     raise InputError("model/config.json is missing")
    Traceback (most recent call last):
    mora_jax.errors.InputError: --init-from: model/config.json is missing

    Args:
      place: a file or folder.
      option: the option that gives it.
    """
    try:
        yield
    except InputError as error:
        message = str(error)
        before = " ".join(filter(None, (option, "" if place in message else place)))
        raise InputError(f"{before}: {message}" if before else message) from error
