"""Who waits: owners in turn, who needs no slot passes by, and no more than may."""

from __future__ import annotations

import pytest

from megalodon.inference.feed import TokenFeed
from megalodon.inference.request import Generation, QueueFullError, Request
from megalodon.inference.schedule import Schedule
from megalodon.inference.work import Counters, Work


def make_work(owner: str = "a", choices: int | None = 1) -> Work:
    generation = None if choices is None else Generation(choices=choices)
    return Work(Request(owner, None, TokenFeed(), generation, lambda event: None), Counters())


def waiting(*works: Work) -> Schedule:
    schedule = Schedule(10)
    for work in works:
        schedule.add(work)
    return schedule


def test_owners_in_turn() -> None:
    first, second, other = make_work("a"), make_work("a"), make_work("b")
    schedule = waiting(first, second, other)
    assert [schedule.next(9, True) for _ in range(4)] == [first, other, second, None]


def test_nobody_who_needs_slots_passes_by_one_that_waits_for_some() -> None:
    wide, narrow, reader = make_work("a", 4), make_work("b", 1), make_work("c", None)
    schedule = waiting(wide, narrow, reader)
    assert schedule.next(3, True) is reader and schedule.next(3, True) is None
    assert schedule.next(4, True) is wide and schedule.next(0, True) is None and schedule.next(1, True) is narrow


def test_readers_wait_for_room_and_hold_up_nobody() -> None:
    reader, narrow = make_work("a", None), make_work("b", 1)
    schedule = waiting(reader, narrow)
    assert schedule.next(1, False) is narrow and schedule.next(1, False) is None
    assert schedule.next(0, True) is reader


def test_no_more_wait_than_may() -> None:
    schedule = Schedule(2)
    works = [make_work(), make_work()]
    for work in works:
        schedule.add(work)
    with pytest.raises(QueueFullError, match="2 requests"):
        schedule.add(make_work())
    works[0].finish(1)
    schedule.forget_ended()
    assert schedule.works() == [works[1]] and len(schedule) == 1
    schedule.add(make_work())
    with pytest.raises(ValueError, match="queue_length is 0"):
        Schedule(0)
