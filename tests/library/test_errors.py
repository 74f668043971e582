"""The message of an InputError is one line, whatever a file put into it."""

import pickle

import pytest

from mora_jax.errors import InputError, located, reason


def test_a_message_is_one_line_that_no_terminal_obeys():
    error = InputError("key a\nb\x1b[31m\u2028\ud800 é is unknown")
    assert str(error) == "key a\\nb\\x1b[31m\\u2028\\ud800 é is unknown"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # as from a worker process


@pytest.mark.parametrize(
    ("place", "option", "said"),
    [
        ("a.json", "", "a.json: line 3 is odd"),
        ("a.json", "--init-from", "--init-from a.json: line 3 is odd"),
        ("line 3", "", "line 3 is odd"),
        ("line 3", "--init-from", "--init-from: line 3 is odd"),
    ],
)
def test_a_place_is_named_once(place, option, said):
    with pytest.raises(InputError) as error, located(place, option):
        raise InputError("line 3 is odd")
    assert str(error.value) == said


def test_a_missing_file_is_not_named_again():
    assert reason(FileNotFoundError("bucket/name")) == "No such file or directory"
