"""The one base class of errors that a user can mend: bad input, a full disk, a damaged file.

The command line prints such an error as one message. Any other exception is a fault of the program and shows its
traceback.
"""


class UserError(Exception):
    """Something that the user can mend. The message says what is wrong and what to do."""


_LONGEST = 80  # characters of a value in a message


def shown(value: object) -> str:
    """Return a value as a message shows it: quoted if it is text, cut if it is long."""
    text = repr(value)
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST - 20]}... ({len(text):,} characters)"
