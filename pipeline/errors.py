"""The one base class of errors that a user can mend: bad input, a full disk, a damaged file.

The command line prints such an error as one message. Any other exception is a fault of the program and shows its
traceback.
"""


class UserError(Exception):
    """Something that the user can mend. The message says what is wrong and what to do."""
