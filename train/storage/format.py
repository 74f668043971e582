"""The number that a run or a data set states of its format, so that an older program can refuse it.

1: no number is stated, as in everything written before there was one. 2: the first that is stated. 3: the
methods of stacked kernels name the axis of their stack. 4: a data set states what is put around documents and
where their text was found, and may lack training rows. 5: checkpoints may refer to a base that they share.
6: the rows of a data set may hold examples, with weights and segments.
"""

from typing import Any

from mora_jax.errors import InputError

FORMAT = 6
KEY = "format"


def check_format(stated: dict[str, Any], name: str) -> int:
    """Returns the format that a file of a run or a data set states, which is 1 if it states none.

    Args:
      stated: the content of the file.
      name: the folder, as the user names it.

    Raises:
      InputError: the format is newer than this program's, or not a number.
    """
    number = stated.get(KEY, 1)
    if type(number) is not int or number < 1:
        raise InputError(f"{name} states {number!r} as its format, which is not a number from 1")
    if number > FORMAT:
        raise InputError(
            f"{name} has format {number}, and this version reads formats up to {FORMAT}; "
            "install a newer version (`mora --version` shows this one)"
        )
    return number
