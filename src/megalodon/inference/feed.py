"""A text on its way to the engine: token ids, put in by whoever tokenizes and taken out by the engine."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

CAPACITY = 1 << 16


class TokenFeed:
    """Token ids in order, from one thread to another, never more than `capacity` and one piece at a time.

    Attributes:
        total: tokens put in so far.
        marks: ascending, where the text is likely to be left by a later one: how many tokens lie before the beginning
            of each message, say.
    """

    def __init__(self, tokens: np.ndarray | None = None, capacity: int = CAPACITY, marks: Sequence[int] = ()) -> None:
        """With `tokens`, a feed that holds just those and is closed."""
        self.total, self.marks = 0, sorted(marks)
        self._pieces: deque[np.ndarray] = deque()
        self._waiting = 0
        self._capacity = capacity
        self._closed = tokens is not None
        self._abandoned = False
        self._changed = threading.Condition()
        self._on_change: Callable[[], None] | None = None
        if tokens is not None and len(tokens):
            self._add(np.asarray(tokens, dtype=np.int64))

    def put(self, tokens: np.ndarray, timeout: float | None = None) -> bool:
        """Add tokens at the end; waits while the feed is full.

        Returns:
            False when nobody will take them any more.

        Raises:
            TimeoutError: if the feed stays full.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._abandoned or self._waiting < self._capacity, timeout):
                raise TimeoutError("the engine has not taken the text so far")
            if self._abandoned:
                return False
            if len(tokens):
                self._add(np.asarray(tokens, dtype=np.int64))
        self._wake()
        return True

    @property
    def full(self) -> bool:
        """Whether `put` would wait now."""
        return self._waiting >= self._capacity and not self._abandoned

    def close(self) -> None:
        """No more tokens will come."""
        with self._changed:
            self._closed = True
        self._wake()

    @property
    def closed(self) -> bool:
        """Whether all has been put in."""
        return self._closed

    def abandon(self) -> None:
        """Whoever takes has gone: `put` returns at once."""
        with self._changed:
            self._abandoned = True
            self._pieces.clear()
            self._waiting = 0
            self._changed.notify_all()

    def take(self) -> tuple[np.ndarray, bool]:
        """All tokens that have arrived, and whether they were the last."""
        with self._changed:
            pieces, closed = list(self._pieces), self._closed
            self._pieces.clear()
            self._waiting = 0
            self._changed.notify_all()
        if len(pieces) == 1:
            return pieces[0], closed
        return (np.concatenate(pieces) if pieces else np.array([], dtype=np.int64)), closed

    def on_change(self, call: Callable[[], None]) -> None:
        """Have `call` called, from the other thread, whenever there is something to take."""
        self._on_change = call

    def _add(self, tokens: np.ndarray) -> None:
        self._pieces.append(tokens)
        self._waiting += len(tokens)
        self.total += len(tokens)

    def _wake(self) -> None:
        if self._on_change is not None:
            self._on_change()
