"""The one exception for input that the user can mend, and how what files say is shown."""


def spelled_out(text: str) -> str:
    """One line for a terminal: line ends and whatever else it would obey, or could not print, as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class InputError(ValueError):
    """Bad input. The message is one line that names what is wrong and how to mend it.

    The command line prints that line and exits with a non-zero status. What files say comes into messages, so
    they are spelled out.
    """

    def __init__(self, message: str) -> None:
        super().__init__(spelled_out(message))
