"""Writes to a store that may be away: what it does not take now waits, in order, until it answers again."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipeline import console
from pipeline.tracking import store
from pipeline.tracking.credentials import hidden
from pipeline.tracking.store import StoreError, Unreachable, talking

_PAUSE = 20.0  # seconds between two attempts at a store that does not answer: each may take some
_SHORT_PAUSE = 2.0  # the same where there is nothing else to do


class Outbox:
    """The writes of this process that the store does not have yet.

    An outage never stops a computation: the study's journal and the stages' files hold the results. It is told once.

    Attributes:
        waiting: The writes, oldest first.
    """

    def __init__(self) -> None:
        self.waiting: deque[Callable[[], object]] = deque()
        self._next_attempt = 0.0
        self._behind = False
        self._outages: tuple[type[Exception], ...] = (Unreachable,)

    def send(self, write: Callable[[], object]) -> bool:
        """Write, or keep the write for later; return whether it was written.

        Raises:
            StoreError: The store answers and refuses.
        """
        self.waiting.append(write)
        if self._behind and time.monotonic() < self._next_attempt:
            return False
        return self.flush()

    def flush(self) -> bool:
        """Write what waits; return whether nothing is left.

        Raises:
            StoreError: The store answers and refuses one of the writes, which is dropped.
        """
        while self.waiting:
            try:
                with talking():
                    self.waiting[0]()
                    self.waiting.popleft()
            except self._outages as error:
                self._next_attempt = time.monotonic() + _PAUSE
                if not self._behind:
                    console.note(
                        f"tracking is behind: {_said(error)}. The work goes on; what is missing is written later"
                    )
                self._behind = True
                return False
            except Exception:
                self.waiting.popleft()
                raise
        if self._behind:
            self._behind = False
            console.note("tracking has caught up")
        return True

    def settle(self) -> bool:
        """Write what waits, and wait as long as ``store.patience`` says; return whether nothing is left.

        Raises:
            StoreError: The store answers and refuses one of the writes, which is dropped.
        """
        limit = time.monotonic() + store.patience()
        while not (settled := self.flush()) and time.monotonic() < limit:
            time.sleep(_SHORT_PAUSE)
        return settled

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Keep what the store refuses, too (it is damaged, full, or lacks what was deleted), and try again at the end.

        Raises:
            StoreError: At the end the store still refuses.
        """
        outages, self._outages = self._outages, (StoreError, OSError)
        try:
            yield
        finally:
            self._outages = outages
        self.flush()


def _said(error: Exception) -> str:
    text = hidden(str(error)).partition("\n")[0][:300]
    return text if isinstance(error, StoreError) else f"{type(error).__name__}: {text}"
