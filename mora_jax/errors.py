"""The one exception for input that the user can mend."""


class InputError(ValueError):
    """Bad input. The message is one line that names what is wrong and how to mend it.

    The command line prints that line and exits with a non-zero status. What files say comes into messages, so
    line ends and whatever else a terminal would obey are spelled out.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))
