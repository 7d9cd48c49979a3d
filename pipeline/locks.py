"""A file lock that ends with its holders: for the folder of a run, for a study, for a temporary folder.

The lock is ``flock``'s, on an open file. Package ``filelock`` holds the same lock but keeps the open file to itself,
and two uses here need it: ``project`` hands it to the stages it starts, so that a stage which outlives its parent still
counts as a holder, and ``storage`` locks a folder itself. The kernel frees the lock when the last holder ends, however
it ends, so nothing has to be cleaned up and no process id can mislead.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


class Lock:
    """A lock on a file, which is made, or on a folder, which must exist.

    Args:
        path: The file or folder.
    """

    def __init__(self, path: Path):
        flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
        self.descriptor = os.open(path, flags | os.O_CLOEXEC, 0o644)

    def take(self, wait: bool = False) -> bool:
        """Take the lock; return whether this process holds it now.

        Args:
            wait: Wait for other holders to end.
        """
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        return True

    def release(self) -> None:
        """Let go of the lock; a child that was handed the descriptor keeps it."""
        os.close(self.descriptor)
