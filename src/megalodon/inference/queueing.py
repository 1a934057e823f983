"""Who is next: owners take turns, each owner's requests keep their order."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """A queue for each owner, served in turn, so that one with a thousand requests delays another by one."""

    def __init__(self) -> None:
        self._queues: OrderedDict[str, deque[Item]] = OrderedDict()
        self._length = 0  # so that any thread may ask

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Item]:
        for queue in self._queues.values():
            yield from queue

    def append(self, owner: str, item: Item) -> None:
        """Add at the end of the owner's queue."""
        self._queues.setdefault(owner, deque()).append(item)
        self._length += 1

    def pop(self, fits: Callable[[Item], bool]) -> Item | None:
        """The first item of the first owner in turn whose first item fits, or None."""
        for owner, queue in self._queues.items():
            if fits(queue[0]):
                item = queue.popleft()
                self._length -= 1
                if queue:
                    self._queues.move_to_end(owner)
                else:
                    del self._queues[owner]
                return item
        return None

    def remove(self, leaves: Callable[[Item], bool]) -> list[Item]:
        """Take out all items that leave."""
        gone = [item for item in self if leaves(item)]
        if not gone:
            return gone
        self._length -= len(gone)
        for owner in list(self._queues):
            kept = deque(item for item in self._queues[owner] if not any(item is other for other in gone))
            if kept:
                self._queues[owner] = kept
            else:
                del self._queues[owner]
        return gone
