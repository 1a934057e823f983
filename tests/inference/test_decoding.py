"""Who decodes: a token of everybody a step; a part of the engine without its thread."""

from __future__ import annotations

import pytest
import torch

from engine_cases import make_engine, reads, text_tokens
from megalodon.inference.engine import Engine
from megalodon.inference.request import Done, Ended, Event, Failure
from megalodon.inference.work import Work


@pytest.fixture
def engine() -> Engine:
    return make_engine()


def in_slots(engine: Engine, count: int, max_tokens: int) -> list[tuple[Work, list[Event]]]:
    works = [reads(engine, text_tokens(i, 5 + i), max_tokens) for i in range(count)]
    while len(engine.reading):
        engine.reading.step()
    return works


def test_each_step_decodes_one_token_of_everybody(engine: Engine) -> None:
    works = in_slots(engine, 3, 4)
    for step in range(1, 4):
        assert engine.decoding.step() and [work.generated for work, _ in works] == [step] * 3
    assert engine.decoding.step() and len(engine.decoding) == 0 and not engine.decoding.step()
    for work, events in works:
        assert work.ended and isinstance(events[-1], Done) and isinstance(events[-2], Ended)
        assert events[-1].usage.completion_tokens == 4


def test_freed_slots_are_closed_up() -> None:
    engine = make_engine(slots=32)
    works = in_slots(engine, 20, 50)
    for work, _ in works[:12]:
        work.fail(Failure.cancelled, "")
    engine.decoding.forget_ended()
    assert engine.decoding.free == 24
    engine.decoding.step()
    assert max(engine.decoding._occupants) < 16 and engine.decoding.works() != []
    assert {id(work) for work in engine.decoding.works()} == {id(work) for work, _ in works[12:]}


def test_tokens_that_were_generated_are_decoded_again_and_come_back_to_be_read(engine: Engine) -> None:
    (work, events), *_ = in_slots(engine, 1, 3)
    while not work.ended:
        engine.decoding.step()
    start = next(event.snapshot for event in events if isinstance(event, Ended))
    assert start is not None and [segment.kind for segment in start.tail] == ["read", "generated"]
    again, _ = reads(engine, text_tokens(5, 30), start=start)
    assert again.reserved == 1
    while again.reader is not None and again.reader.state is not None:
        assert engine.reading.step()
    assert len(engine.decoding) == 1 and again.reserved == 0 and not engine.reading.step(), "it waits for its slot"
    while len(engine.decoding):
        engine.decoding.step()
    assert again.reserved == 1 and again.reader is not None and again.reader.state is not None
    while not again.ended:
        assert engine.reading.step() or engine.decoding.step()
    assert again.generated == 0 and engine.counters.generated_tokens == 3


def test_a_step_that_fails_fails_everybody_in_it(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    works = in_slots(engine, 2, 4)
    monkeypatch.setattr(engine.decoder, "step", lambda *_: 1 / 0)
    assert engine.decoding.step() and len(engine.decoding) == 0 and all(work.ended for work, _ in works)


def test_logits_that_are_not_finite_fail_their_request_alone(engine: Engine) -> None:
    works = in_slots(engine, 2, 4)
    with torch.inference_mode():
        engine.decoder.layers[0].h[0] = torch.nan
    engine.decoding.step()
    assert [work.ended for work, _ in works] == [True, False] and engine.decoding.free == engine.slots - 1
