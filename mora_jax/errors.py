"""The one exception for input that the user can mend."""


class InputError(ValueError):
    """Bad input. The message is one line that names what is wrong and how to mend it.

    The command line prints that line and exits with a non-zero status; nothing else is caught there.
    """
