"""Who waits, who reads and who holds slots: requests are let in in turn, and let go of when they end.

Everything here runs in the engine's thread, except where the inbox is filled.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from megalodon.inference.prefix_cache import PrefixCache, PrefixStore
from megalodon.inference.queueing import FairQueue
from megalodon.inference.reading import Reader
from megalodon.inference.request import Event, Failed, Failure
from megalodon.inference.snapshot import Snapshot
from megalodon.inference.work import Counters, RefusedError, Work

READERS_PER_SLOT = 4
"""So many requests that need no slot may read at once, for each slot: most of them wait for their text to arrive."""
_log = logging.getLogger(__name__)


class Schedule:
    """The requests of an engine.

    Attributes:
        counters: for metrics.
        slots: sequences that can generate at once.
        empty: where a text without a context begins.
        block, piece: tokens between two places where a sequence can be taken up, and tokens read at once.
        prefixes: states of texts read before, or None.
    """

    def __init__(
        self, slots: int, empty: Snapshot, block: int, piece: int, prefixes: PrefixStore | None, share_prefixes: bool
    ) -> None:
        """`share_prefixes`: owners use one another's."""
        self.slots, self.empty, self.block, self.piece, self.prefixes = slots, empty, block, piece, prefixes
        self.counters = Counters()
        self._share_prefixes = share_prefixes
        self._inbox: deque[Work] = deque()
        self._waiting: FairQueue[Work] = FairQueue()
        self._reading: deque[Work] = deque()
        self._rows: dict[int, Work] = {}  # by slot
        self._changed = threading.Condition()

    def _all(self) -> list[Work]:
        self._take_in()
        running = {id(work): work for work in [*self._reading, *self._rows.values()]}
        return [*self._waiting, *running.values()]

    def _take_in(self) -> None:
        with self._changed:
            while self._inbox:
                work = self._inbox.popleft()
                self._waiting.append(work.request.owner, work)

    def _drop(self) -> None:
        now = time.monotonic()
        for work in self._all():
            if work.request.cancelled.is_set():
                self._fail(work, Failure.cancelled, "the request was cancelled")
            elif now > work.deadline:
                self._fail(work, Failure.timeout, f"not complete after {work.request.seconds:g} seconds")

    def _admit(self) -> None:
        while True:
            free = self.slots - len(self._rows) - sum(work.reserved for work in self._reading)
            readers = sum(work.slots_needed == 0 for work in self._reading)
            work = self._waiting.pop(self._fitting(free, readers < READERS_PER_SLOT * self.slots))
            if work is None:
                return
            work.reserved = work.slots_needed
            self._reading.append(work)

    def _fitting(self, free: int, room: bool) -> Callable[[Work], bool]:
        """Whether work may begin: with `free` slots, and `room` for work that needs none.

        Once some must wait for slots, only work that needs none passes it by. Neither kind holds up the other, so texts
        that never arrive hold up no answers.
        """
        blocked = False

        def fits(work: Work) -> bool:
            nonlocal blocked
            needed = self._begin(work)
            if needed == 0:
                return room
            blocked = blocked or needed > free
            return not blocked

        return fits

    def _begin(self, work: Work) -> int:
        """Slots that the work needs."""
        if work.reader is None:
            request, cache = work.request, None
            if self.prefixes is not None:
                cache = PrefixCache(self.prefixes, "" if self._share_prefixes else request.owner)
            only = request.generation is None
            start = request.start or self.empty
            work.reader = Reader(start, request.feed, self.block, self.piece, cache, only)
            work.slots_needed = request.generation.choices if request.generation else int(work.reader.replays)
        return work.slots_needed

    # --- endings ----------------------------------------------------------------------------------------------------

    def _guarded(self, work: Work, do: Callable[[], int | None]) -> int | None:
        """Let what goes wrong in one request be that request's failure alone."""
        try:
            return do()
        except RefusedError as refused:
            self._fail(work, refused.failure, str(refused))
        except Exception as error:
            _log.exception("a request failed")
            self._fail(work, Failure.internal, str(error))
        return 0

    def _fail(self, work: Work, failure: Failure, message: str) -> None:
        self._waiting.remove(lambda other: other is work)
        if work in self._reading:
            self._reading.remove(work)
        for slot in [slot for slot, other in self._rows.items() if other is work]:
            del self._rows[slot]
        work.continuations.clear()
        work.reserved = 0
        work.request.feed.abandon()
        if failure is not Failure.cancelled:
            self.counters.failures += 1
        self._emit(work, Failed(failure, message))

    def _emit(self, work: Work, event: Event) -> None:
        try:
            work.request.listener(event)
        except Exception:  # a listener's defect must not stop the others
            _log.exception("a listener failed")
            work.request.cancelled.set()
