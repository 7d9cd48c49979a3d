"""Writes to a store that may be away: what it does not take now waits, in order, until it answers again."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from pipeline import console
from pipeline.tracking.store import Unreachable, talking

_PAUSE = 20.0  # seconds between two attempts at a store that does not answer: each may take some


class Outbox:
    """The writes of this process that the store does not have yet.

    An outage never stops a computation: the study's journal and the stages' files hold the results. It is told once.

    Attributes:
        waiting: The writes, oldest first.
    """

    def __init__(self) -> None:
        self.waiting: deque[Callable[[], object]] = deque()
        self._next_attempt = 0.0

    def send(self, write: Callable[[], object]) -> bool:
        """Write, or keep the write for later; return whether it was written.

        Raises:
            StoreError: The store answers and refuses.
        """
        behind = bool(self.waiting)
        self.waiting.append(write)
        if behind and time.monotonic() < self._next_attempt:
            return False
        return self.flush()

    def flush(self) -> bool:
        """Write what waits; return whether nothing is left.

        Raises:
            StoreError: The store answers and refuses one of the writes, which is dropped.
        """
        behind = len(self.waiting) > 1
        while self.waiting:
            try:
                with talking():
                    self.waiting[0]()
                    self.waiting.popleft()
            except Unreachable as error:
                self._next_attempt = time.monotonic() + _PAUSE
                if not behind:
                    console.note(f"tracking is behind: {error}. The work goes on; what is missing is written later")
                return False
            except Exception:
                self.waiting.popleft()
                raise
        if behind:
            console.note("tracking has caught up")
        return True
