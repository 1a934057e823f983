"""Who waits: requests that have not begun, let in one at a time, owners in turn."""

from __future__ import annotations

import threading
from collections.abc import Callable

from megalodon.inference.queueing import FairQueue
from megalodon.inference.request import QueueFullError
from megalodon.inference.work import Work


class Schedule:
    """The requests that wait. Any thread may add one.

    Attributes:
        most: requests that may wait.
    """

    def __init__(self, most: int) -> None:
        if most < 1:
            raise ValueError(f"queue_length is {most}; it must be 1 or more")
        self.most = most
        self._queue: FairQueue[Work] = FairQueue()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, work: Work) -> None:
        """Have a request wait.

        Raises:
            QueueFullError: if as many wait as may.
        """
        with self._lock:
            if len(self._queue) >= self.most:
                raise QueueFullError(f"{self.most} requests are waiting already")
            self._queue.append(work.request.owner, work)

    def next(self, free: int, room: bool) -> Work | None:
        """Take out who may begin, with `free` slots, and `room` for requests that need none; None if nobody may.

        Once some must wait for slots, only work that needs none passes it by. Neither kind holds up the other, so texts
        that never arrive hold up no answers.
        """
        with self._lock:
            return self._queue.pop(self._fitting(free, room))

    def works(self) -> list[Work]:
        """All that wait."""
        with self._lock:
            return list(self._queue)

    def forget_ended(self) -> None:
        """Let go of requests that have ended."""
        with self._lock:
            self._queue.remove(lambda work: work.ended)

    @staticmethod
    def _fitting(free: int, room: bool) -> Callable[[Work], bool]:
        blocked = False

        def fits(work: Work) -> bool:
            nonlocal blocked
            needed = work.slots_needed
            if needed == 0:
                return room
            blocked = blocked or needed > free
            return not blocked

        return fits
