"""The message of an InputError is one line, whatever a file put into it."""

import pickle

from mora_jax.errors import InputError


def test_a_message_is_one_line_that_no_terminal_obeys():
    error = InputError("key a\nb\x1b[31m\u2028\ud800 é is unknown")
    assert str(error) == "key a\\nb\\x1b[31m\\u2028\\ud800 é is unknown"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # as from a worker process
