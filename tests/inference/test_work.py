"""A request in the engine ends once, harms no other, and says what it needs."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from engine_cases import make_engine, run, submit, text_tokens
from megalodon.inference.feed import TokenFeed
from megalodon.inference.request import Done, Event, Failed, Failure, Generation, Progress, Request
from megalodon.inference.snapshot import Segment
from megalodon.inference.work import Counters, RefusedError, Work


def make_work(events: list[Event], counters: Counters | None = None, **fields: object) -> Work:
    request = Request("a", None, TokenFeed(), Generation(), events.append)
    return Work(replace(request, **fields), counters or Counters())


def test_what_goes_wrong_fails_the_request_alone() -> None:
    events: list[Event] = []
    counters = Counters()
    work = make_work(events, counters)
    assert work.guarded(lambda: 7) == 7 and not work.ended

    def refuse() -> None:
        raise RefusedError(Failure.too_long, "too long")

    assert work.guarded(refuse) is None and work.ended
    assert events == [Failed(Failure.too_long, "too long")] and counters.failures == 1
    other = make_work(events, counters)
    assert other.guarded(lambda: 1 // 0) is None and other.ended
    assert isinstance(events[-1], Failed) and events[-1].failure is Failure.internal


def test_its_end_lets_go_of_the_text_and_of_slots() -> None:
    events: list[Event] = []
    work = make_work(events)
    work.reserved = 3
    work.finish(12)
    assert work.ended and work.reserved == 0 and not work.request.feed.put(np.array([1]))
    assert isinstance(events[0], Done) and events[0].usage.prompt_tokens == 12


def test_cancelled_and_late() -> None:
    events: list[Event] = []
    counters = Counters()
    work = make_work(events, counters, seconds=5.0)
    work.fail_if_over(time.monotonic())
    assert not work.ended
    work.fail_if_over(time.monotonic() + 6)
    assert isinstance(events[-1], Failed) and events[-1].failure is Failure.timeout and counters.failures == 1
    cancelled = make_work(events, counters)
    cancelled.request.cancel()
    cancelled.fail_if_over(time.monotonic())
    assert isinstance(events[-1], Failed) and events[-1].failure is Failure.cancelled and counters.failures == 1


def test_a_listener_that_fails_cancels_its_request() -> None:
    def defect(event: Event) -> None:
        raise ZeroDivisionError

    work = make_work([], listener=defect)
    work.emit(Progress(1, 1, 0, 0))
    assert work.request.cancelled.is_set() and not work.ended


def test_slots_needed() -> None:
    engine = make_engine()
    start = run(engine, submit(engine, text_tokens(1, 20), read_only=True, keep=True)).snapshot
    generated = replace(start, tail=(*start.tail, Segment("generated", np.array([3]))))
    assert make_work([], generation=Generation(choices=3), start=generated).slots_needed == 3
    assert make_work([], generation=None, start=start).slots_needed == 0
    assert make_work([], generation=None, start=generated).slots_needed == 1
