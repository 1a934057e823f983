"""Owners take turns; each owner's requests keep their order."""

from __future__ import annotations

from megalodon.inference.queueing import FairQueue


def test_owners_take_turns_in_their_own_order() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in ("a1", "a2", "a3", "b1", "c1", "b2"):
        queue.append(item[0], item)
    taken = []
    while (item := queue.pop(lambda _: True)) is not None:
        taken.append(item)
        assert len(queue) == 6 - len(taken)
    assert taken == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_what_does_not_fit_stays_first() -> None:
    queue: FairQueue[int] = FairQueue()
    for owner, item in (("a", 9), ("a", 1), ("b", 2)):
        queue.append(owner, item)
    assert queue.pop(lambda item: item < 5) == 2
    assert queue.pop(lambda item: item < 5) is None
    assert [queue.pop(lambda _: True) for _ in range(3)] == [9, 1, None]


def test_removed_items_are_gone() -> None:
    queue: FairQueue[int] = FairQueue()
    for i in range(6):
        queue.append(str(i % 2), i)
    assert sorted(queue.remove(lambda item: item < 3)) == [0, 1, 2] and len(queue) == 3
    assert sorted(queue) == [3, 4, 5] and queue.remove(lambda _: False) == []
