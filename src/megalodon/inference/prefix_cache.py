"""States of texts that were read before, found by the exact text: in memory first, then on disk.

A key is a hash of the owner and of every token up to a block boundary, so a state is found only by who has the very
text (and, unless the operator shares them, the same owner).

What is given up when there is no room: every state has a worth, the tokens that it is expected to save. Those are the
tokens between it and the state before it on its text, times how likely the next text leaves this one before the state
after it: the more likely the nearer to the end, and certain where texts have parted before. So the densest go first,
and what is left is at growing distances from the end. A worth counts from when a text last went that way (the
GreedyDual rule: what is given up raises the worth of whatever comes or is used later), so that what nobody asks for
goes in the end, however much it would save.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from megalodon.inference.prefix_files import PrefixFiles
from megalodon.inference.snapshot_file import ModelIdentity
from megalodon.models import State

NEWS = 4096
"""Keys of states kept last, for texts that are being read at the same time."""
MOST_TO_WRITE = 1 << 28
"""Bytes of states that may wait to be written; more are dropped, as they would pile up in memory."""


@dataclass
class CacheCounters:
    """What the cache holds and has done."""

    hits: int = 0
    memory_bytes: int = 0
    disk_bytes: int = 0
    memory_entries: int = 0
    disk_entries: int = 0


@dataclass(eq=False)
class Kept:
    """A state, or its file, and where it lies on the texts that have it.

    Attributes:
        position: tokens before it. distance: from there to the end of the text that went this way last.
        state: None when it is on disk alone. memory, disk: bytes that it takes there.
        before: the next kept state towards the beginning. after: those next towards the ends.
        since: the store's clock when a text last went this way.
        followed: another text than the one that it was kept for has gone this way.
    """

    key: str
    position: int = 0
    distance: int = 0
    state: State | None = None
    memory: int = 0
    disk: int = 0
    before: Kept | None = None
    after: set[Kept] = field(default_factory=set)
    since: float = 0.0
    priority: float = 0.0
    followed: bool = False

    @property
    def worth(self) -> float:
        """Tokens that it is expected to save."""
        saved = self.position - (0 if self.before is None else self.before.position)
        if len(self.after) != 1:  # texts end or part here
            return saved
        stretch = max(next(iter(self.after)).position - self.position, 0)
        return saved * stretch / max(self.distance, stretch, 1)


class PrefixStore:
    """Where the states are, for all owners. Any thread may call it.

    Attributes:
        counters: for metrics.
        told: how many times a state was kept; see `news`.
    """

    def __init__(
        self, identity: ModelIdentity, memory_bytes: int, folder: Path | None = None, disk_bytes: int = 0
    ) -> None:
        """
        Args:
            identity: of the model; files of any other are not read.
            memory_bytes: how much the states in memory may take.
            folder: where states go that no longer fit; None drops them.
            disk_bytes: how much the files there may take.
        """
        self.counters = CacheCounters()
        self._memory_bytes, self._disk_bytes = memory_bytes, disk_bytes
        self._kept: dict[str, Kept] = {}
        self._in_memory = _Lowest(lambda kept: kept.memory > 0)
        self._on_disk = _Lowest(lambda kept: kept.disk > 0)
        self._clock, self._writing = 0.0, 0
        self._news: deque[str] = deque(maxlen=NEWS)
        self.told = 0
        self._removed: deque[str] = deque()
        self._lock = threading.RLock()
        self._looker = ThreadPoolExecutor(1, "prefix-look-up")
        self._files = None if folder is None else PrefixFiles(folder, identity)
        self._writer = None if folder is None else ThreadPoolExecutor(1, "prefix-cache")
        for age, (key, size) in enumerate(self._files or ()):
            self._kept[key] = kept = Kept(key, priority=age * 1e-9)
            self._count(kept, disk=size)
            self._on_disk.push(kept)
        with self._lock:
            self._trim()
        self._remove_files()

    # --- finding ----------------------------------------------------------------------------------------------------

    def __contains__(self, key: str) -> bool:
        return key in self._kept

    def get(self, key: str, only_memory: bool = False) -> State | None:
        """The state of this key, if there is one; read from its file if need be, unless `only_memory`."""
        with self._lock:
            kept = self._kept.get(key)
            if kept is None or (kept.state is None and (only_memory or self._files is None)):
                return None
            state = kept.state
            if state is not None:
                self.counters.hits += 1
                return state
        assert self._files is not None
        state = self._files.load(key)
        with self._lock:
            if state is None:
                self._count(kept, disk=0)
                self._forget(kept)
                return None
            self.counters.hits += 1
            if self._kept.get(key) is kept:
                self._hold(kept, state)
                self._trim()
        self._remove_files_beside()
        return state

    def follow(self, path: Sequence[tuple[int, str]], end: int, found: Collection[str]) -> None:
        """Note that a text of `end` tokens has these beginnings: (tokens, key), ever longer.

        `found`: keys of those that were kept for other texts.
        """
        found = frozenset(found)
        with self._lock:
            before: Kept | None = None
            passed = [(position, self._kept[key]) for position, key in sorted(set(path)) if key in self._kept]
            for position, kept in passed:
                kept.position, kept.distance, kept.since = position, end - position, self._clock
                kept.followed = kept.followed or kept.key in found
                if before is not None:
                    self._hang(kept, before)
                before = kept
            for _, kept in passed:
                self._rate(kept)

    def leaves(self, key: str) -> int | None:
        """Where the next state lies that is kept of a text with this beginning; None if there is none."""
        with self._lock:
            kept = self._kept.get(key)
            return min((other.position for other in kept.after), default=None) if kept is not None else None

    def news(self, told: int) -> tuple[list[str], int]:
        """Keys of states kept since `told`, the number that the last call gave; and the number for the next."""
        with self._lock:
            count = min(self.told - told, len(self._news))
            return list(itertools.islice(reversed(self._news), max(count, 0))), self.told

    def beside(self, look: Callable[[], None]) -> Future[None]:
        """Have a look-up done in a thread beside the engine."""
        return self._looker.submit(look)

    # --- keeping ----------------------------------------------------------------------------------------------------

    def put(self, key: str, state: State, position: int, end: int, path: Sequence[tuple[int, str]] = ()) -> None:
        """Keep a state, which must not be changed afterwards.

        Args:
            key: of the text before it.
            state: what reading that text leaves.
            position: tokens of it.
            end: tokens of the whole text, as far as they are known.
            path: (tokens, key) of shorter beginnings of the text that were kept, ever longer.
        """
        with self._lock:
            kept = self._kept.get(key)
            if kept is None:
                kept = self._kept[key] = Kept(key, position)
                shorter = (before for at, before in reversed(path) if at < position and before in self._kept)
                nearest = next(shorter, None)
                self._hang(kept, None if nearest is None else self._kept[nearest])
            else:
                kept.followed = True
            kept.distance, kept.since = max(end - position, 0), self._clock
            if not kept.memory:
                self._hold(kept, state)
            self._rate(kept)
            if kept.before is not None:
                self._rate(kept.before)
            self._news.append(key)
            self.told += 1
            self._trim()
        self._remove_files_beside()

    def drop(self, key: str) -> None:
        """Give up a state, unless another text has gone its way too."""
        with self._lock:
            kept = self._kept.get(key)
            if kept is not None and not kept.followed:
                self._release(kept)
                self._remove_file(kept)
                self._forget(kept)
        self._remove_files_beside()

    def close(self) -> None:
        """Finish writing."""
        self._looker.shutdown(cancel_futures=True)
        if self._writer is not None:
            self._writer.shutdown()

    # --- the rest is done while the lock is held --------------------------------------------------------------------

    def _hang(self, kept: Kept, before: Kept | None) -> None:
        """Note which kept state lies before this one."""
        if kept.before is not before:
            if kept.before is not None:
                kept.before.after.discard(kept)
            kept.before = before
            if before is not None:
                before.after.add(kept)

    def _rate(self, kept: Kept) -> None:
        kept.priority = kept.since + kept.worth
        for heap in (self._in_memory, self._on_disk):
            heap.push(kept)

    def _hold(self, kept: Kept, state: State) -> None:
        """Have a state in memory."""
        kept.state = state
        self._count(kept, memory=state.nbytes)
        self._in_memory.push(kept)

    def _release(self, kept: Kept) -> None:
        """Let a state go from memory."""
        kept.state = None
        self._count(kept, memory=0)

    def _remove_file(self, kept: Kept) -> None:
        """Have a state's file removed, when the lock is not held."""
        if kept.disk:
            self._count(kept, disk=0)
            self._removed.append(kept.key)

    def _count(self, kept: Kept, memory: int | None = None, disk: int | None = None) -> None:
        """Note how many bytes an entry takes."""
        counters = self.counters
        if memory is not None:
            counters.memory_bytes += memory - kept.memory
            counters.memory_entries += (memory > 0) - (kept.memory > 0)
            kept.memory = memory
        if disk is not None:
            counters.disk_bytes += disk - kept.disk
            counters.disk_entries += (disk > 0) - (kept.disk > 0)
            kept.disk = disk

    def _forget(self, kept: Kept) -> None:
        """Take an entry out that is nowhere any more; its neighbours become each other's."""
        if self._kept.get(kept.key) is kept:
            del self._kept[kept.key]
        before, after = kept.before, list(kept.after)
        self._hang(kept, None)
        for other in after:
            self._hang(other, before)
            self._rate(other)
        if before is not None:
            self._rate(before)

    def _trim(self) -> None:
        """Give up what is worth least until everything fits."""
        while self.counters.memory_bytes > self._memory_bytes and (kept := self._in_memory.pop()) is not None:
            self._clock = max(self._clock, kept.priority)
            state = kept.state
            self._release(kept)
            if kept.disk:
                continue
            if state is not None and self._writer is not None and self._writing < MOST_TO_WRITE:
                self._writing += state.nbytes
                kept.state = state  # found until its file is there
                self._writer.submit(self._save, kept, state)
            else:
                self._forget(kept)
        while self.counters.disk_bytes > self._disk_bytes and (kept := self._on_disk.pop()) is not None:
            self._remove_file(kept)
            if kept.state is None:
                self._forget(kept)

    # --- in the writer's thread -------------------------------------------------------------------------------------

    def _save(self, kept: Kept, state: State) -> None:
        assert self._files is not None
        self._remove_files()
        size = self._files.save(kept.key, state)
        with self._lock:
            self._writing -= state.nbytes
            if not kept.memory:
                kept.state = None
            if self._kept.get(kept.key) is not kept:  # dropped meanwhile
                self._removed.append(kept.key)
            elif size:
                self._count(kept, disk=size)
                self._on_disk.push(kept)
                self._trim()
            elif not kept.memory:
                self._forget(kept)
        self._remove_files()

    def _remove_files_beside(self) -> None:
        if self._removed and self._writer is not None:
            self._writer.submit(self._remove_files)

    def _remove_files(self) -> None:
        while self._removed and self._files is not None:
            self._files.remove(self._removed.popleft())


class _Lowest:
    """Entries by priority, the lowest first. Whatever has changed since it was pushed is passed over."""

    def __init__(self, holds: Callable[[Kept], bool]) -> None:
        self._holds = holds
        self._heap: list[tuple[float, int, Kept]] = []
        self._serial = itertools.count()
        self._most = 1024

    def push(self, kept: Kept) -> None:
        if self._holds(kept):
            heapq.heappush(self._heap, (kept.priority, next(self._serial), kept))
            if len(self._heap) > self._most:
                latest = {id(item[2]): item for item in self._heap if self._valid(item)}
                self._heap = list(latest.values())
                heapq.heapify(self._heap)
                self._most = max(1024, 4 * len(self._heap))

    def pop(self) -> Kept | None:
        while self._heap:
            item = heapq.heappop(self._heap)
            if self._valid(item):
                return item[2]
        return None

    def _valid(self, item: tuple[float, int, Kept]) -> bool:
        priority, _, kept = item
        return kept.priority == priority and self._holds(kept)
