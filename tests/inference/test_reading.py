"""What is read: pieces of one text after another; a part of the engine without its thread."""

from __future__ import annotations

import numpy as np
import pytest

from engine_cases import CHUNK, make_engine, reads, text_tokens
from megalodon.inference.engine import Engine
from megalodon.inference.feed import TokenFeed
from megalodon.inference.request import Done, Failed, Failure, Progress


@pytest.fixture
def engine() -> Engine:
    return make_engine()


def test_a_step_reads_one_piece_of_one_text_after_another(engine: Engine) -> None:
    texts = [reads(engine, text_tokens(i, 3 * CHUNK + 5)) for i in range(2)]
    counts = []
    for _ in range(4):
        assert engine.reading.step()
        counts.append([work.reader.position for work, _ in texts if work.reader is not None])
    assert counts == [[16, 0], [16, 16], [32, 16], [32, 32]]
    while engine.reading.step():
        pass
    assert len(engine.reading) == 0 and all(isinstance(events[-1], Done) for _, events in texts)


def test_a_text_that_has_not_arrived_costs_nothing(engine: Engine) -> None:
    late, _ = reads(engine, feed := TokenFeed())
    other, events = reads(engine, text_tokens(1, CHUNK))
    assert engine.reading.step() and other.ended and isinstance(events[-1], Done)
    assert not engine.reading.step() and not late.ended and engine.reading.works() == [late]
    feed.put(text_tokens(2, 5))
    feed.close()
    engine.reading.step()
    assert late.ended and len(engine.reading) == 0


def test_a_read_text_goes_into_as_many_slots_as_it_has_choices(engine: Engine) -> None:
    work, events = reads(engine, text_tokens(1, 5), max_tokens=3, choices=4)
    assert engine.reading.reserved == 4
    while len(engine.reading):
        engine.reading.step()
    assert engine.reading.reserved == 0 and engine.decoding.free == engine.slots - 4 and work.running == 4
    assert isinstance(events[-1], Progress) and events[-1].read == 5


def test_what_cannot_be_read_fails_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    bad, events = reads(engine, np.array([], np.int64), max_tokens=1)
    good, _ = reads(engine, text_tokens(1, 5), max_tokens=1)
    while len(engine.reading):
        engine.reading.step()
    assert bad.ended and isinstance(events[-1], Failed) and events[-1].failure is Failure.empty
    assert not good.ended and good.running == 1


def test_ended_requests_are_forgotten(engine: Engine) -> None:
    works = [reads(engine, TokenFeed())[0] for _ in range(3)]
    works[1].fail(Failure.cancelled, "")
    engine.reading.forget_ended()
    assert engine.reading.works() == [works[0], works[2]]
