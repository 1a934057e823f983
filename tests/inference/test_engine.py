"""The engine: the same answer alone or among others, resumed as if never stopped, fair, bounded, and tidy."""

from __future__ import annotations

import random
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine_cases import CHUNK, Call, make_engine, make_model, run, submit, text_tokens
from megalodon.data import ByteTokenizer
from megalodon.inference import Sampling, Session, generate_text
from megalodon.inference.engine import Engine
from megalodon.inference.feed import TokenFeed
from megalodon.inference.prefix_cache import PrefixStore
from megalodon.inference.reading import READERS_PER_SLOT
from megalodon.inference.request import (
    Delta,
    Ended,
    Failure,
    FinishReason,
    Generation,
    QueueFullError,
    StoppingError,
)
from megalodon.inference.snapshot_file import load_snapshot, save_snapshot

SAMPLINGS = [Sampling(0), Sampling(0.9), Sampling(1.1, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.2)]


def with_cache(memory: int = 1 << 24, folder: Path | None = None, disk: int = 0, **options: object) -> Engine:
    return make_engine(prefixes=lambda identity: PrefixStore(identity, memory, folder, disk), **options)


def test_a_new_engine_is_not_made_anew_at_its_first_request() -> None:
    engine = with_cache()
    made = engine.decoder, engine.prefixes
    assert engine.decoder.is_current()
    run(engine, submit(engine, text_tokens(1, 20), max_tokens=2))
    assert (engine.decoder, engine.prefixes) == made


# --- determinism ----------------------------------------------------------------------------------------------------


def many(engine: Engine, count: int) -> list[Call]:
    """Requests of all kinds."""
    return [
        submit(
            engine,
            text_tokens(i, 1 + 9 * i),
            owner=f"owner-{i % 3}",
            seed=i,
            max_tokens=10 + i % 13,
            sampling=SAMPLINGS[i % 3],
            choices=1 + i % 2,
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_request_gives_the_same_alone_and_among_others(dtype: torch.dtype) -> None:
    model = make_model(dtype)
    alone = []
    for i in range(14):
        engine = make_engine(model)
        calls = many(engine, 14)
        for other in calls[:i] + calls[i + 1 :]:
            other.request.cancel()
        alone.append(run(engine, calls[i]))
    crowded = make_engine(model, slots=32)
    together = many(crowded, 14)
    run(crowded, *together)
    for one, other in zip(alone, together, strict=True):
        assert one.tokens() and one.tokens() == other.tokens() and one.text() == other.text()
        assert one.tokens(1) == other.tokens(1)


def test_the_same_under_load_with_joins_and_cancellations() -> None:
    model = make_model()
    quiet = make_engine(model)
    expected = run(quiet, submit(quiet, text_tokens(99, 150), seed=5, max_tokens=60)).tokens()
    busy, rng = make_engine(model, slots=32), random.Random(0)
    others: list[Call] = []
    call = None
    for step in range(400):
        if step == 20:
            call = submit(busy, text_tokens(99, 150), owner="me", seed=5, max_tokens=60)
        if rng.random() < 0.5:
            others.append(
                submit(busy, text_tokens(step, rng.randrange(1, 90)), seed=step, max_tokens=rng.randrange(1, 40))
            )
        if others and rng.random() < 0.2:
            rng.choice(others).request.cancel()
        busy.step()
    assert call is not None
    run(busy, call)
    assert call.tokens() == expected
    assert sum(not other.failed and other.done for other in others) > 50


def test_greedy_equals_the_plain_session() -> None:
    model = make_model()
    session = Session(model)
    session.read(text_tokens(1, 50))
    expected = list(session.generate(30, Sampling(0)))
    engine = make_engine(model)
    call = run(engine, submit(engine, text_tokens(1, 50), max_tokens=30, sampling=Sampling(0)))
    assert [token for token, _ in call.tokens()] == expected


def test_choices_differ_and_the_first_is_that_of_a_single_one() -> None:
    engine = make_engine()
    single = run(engine, submit(engine, text_tokens(1, 20), max_tokens=20))
    several = run(engine, submit(engine, text_tokens(1, 20), max_tokens=20, choices=4))
    texts = [several.tokens(i) for i in range(4)]
    assert texts[0] == single.tokens() and len({str(text) for text in texts}) == 4
    assert several.usage.completion_tokens == 80 and several.usage.prompt_tokens == 20


# --- resuming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sampling", [SAMPLINGS[0], SAMPLINGS[2]])
def test_resumed_from_a_file_equals_never_stopping(tmp_path: Path, sampling: Sampling, dtype: torch.dtype) -> None:
    engine = make_engine(make_model(dtype))
    whole = run(engine, submit(engine, text_tokens(1, 37), max_tokens=60, seed=4, sampling=sampling)).tokens()
    for cut in (1, 10, 11, 12, 27, 30, 59):  # the text ends 5 tokens into a block: 11 more complete it
        first = run(engine, submit(engine, text_tokens(1, 37), max_tokens=cut, seed=4, sampling=sampling, keep=True))
        save_snapshot(tmp_path / "context", first.snapshot, engine.identity)
        other = make_engine(make_model(dtype))
        start = load_snapshot(tmp_path / "context", other.identity)
        assert start.tokens == 37 + cut
        options = {"seed": None, "resume_generator": True, "sampling": sampling}
        second = run(other, submit(other, start=start, max_tokens=60 - cut, **options))
        assert first.tokens() + second.tokens() == whole


@pytest.mark.parametrize("cut", [1, 15, 16, 17, 50, 64, 99])
def test_text_read_in_two_requests_equals_one(cut: int) -> None:
    engine = make_engine()
    whole = run(engine, submit(engine, text_tokens(1, 100), max_tokens=20, keep=True))
    start = run(engine, submit(engine, text_tokens(1, 100)[:cut], read_only=True, keep=True)).snapshot
    assert start.tokens == cut and start.position == (cut - 1) // CHUNK * CHUNK
    again = run(engine, submit(engine, text_tokens(1, 100)[cut:], start=start, max_tokens=20, keep=True))
    assert again.tokens() == whole.tokens()
    assert again.snapshot.text_fingerprint == whole.snapshot.text_fingerprint
    extended = run(engine, submit(engine, text_tokens(1, 100)[cut:], start=start, read_only=True, keep=True)).snapshot
    assert extended.tokens == 100
    assert run(engine, submit(engine, start=extended, max_tokens=20)).tokens() == whole.tokens()


def test_reading_on_after_generating_equals_never_stopping(tmp_path: Path) -> None:
    """generate, read, generate, read only, generate: each time from a file, or with snapshots passed on."""

    def conversation(through_files: bool) -> list:
        engine = make_engine()
        given = []
        start = None
        for turn in range(5):
            tokens = text_tokens(turn, 7 + 11 * turn)
            call = run(engine, submit(engine, tokens, start, seed=turn, max_tokens=9 + turn, keep=True))
            given += call.tokens()
            start = call.snapshot
            if turn == 2:
                start = run(engine, submit(engine, text_tokens(9, 40), start, read_only=True, keep=True)).snapshot
            if through_files:
                save_snapshot(tmp_path / "context", start, engine.identity)
                engine = make_engine()
                start = load_snapshot(tmp_path / "context", engine.identity)
        return given

    assert conversation(through_files=True) == conversation(through_files=False)


def test_a_snapshot_serves_any_number_of_times() -> None:
    engine = make_engine()
    start = run(engine, submit(engine, text_tokens(1, 40), max_tokens=7, keep=True)).snapshot
    calls = [submit(engine, text_tokens(i, 3), start, max_tokens=30) for i in (2, 3, 2)]
    run(engine, *calls)
    assert calls[0].tokens() == calls[2].tokens() != calls[1].tokens()


# --- cached prefixes ------------------------------------------------------------------------------------------------


def test_a_known_beginning_is_not_read_again_and_changes_nothing() -> None:
    plain = make_engine()
    expected = run(plain, submit(plain, text_tokens(1, 100), max_tokens=20)).tokens()
    engine = with_cache()
    first = run(engine, submit(engine, text_tokens(1, 100), max_tokens=20))
    read = engine.counters.read_tokens
    second = run(engine, submit(engine, text_tokens(1, 100), max_tokens=20))
    assert first.tokens() == second.tokens() == expected
    assert (first.usage.cached_tokens, second.usage.cached_tokens) == (0, 96)
    assert (
        engine.counters.read_tokens - read == 3 and engine.prefixes is not None and engine.prefixes.counters.hits == 1
    )


def test_a_beginning_is_known_up_to_where_texts_part() -> None:
    engine, other = with_cache(), text_tokens(1, 100)
    run(engine, submit(engine, text_tokens(1, 100), max_tokens=2))
    other[70:] = 5
    assert run(engine, submit(engine, other, max_tokens=2)).usage.cached_tokens == 64
    other[3] = 7
    assert run(engine, submit(engine, other, max_tokens=2)).usage.cached_tokens == 0


def test_beginnings_are_not_shared_between_owners_unless_allowed() -> None:
    for share in (False, True):
        engine = with_cache(share_prefixes=share)
        run(engine, submit(engine, text_tokens(1, 100), owner="a", max_tokens=2))
        call = run(engine, submit(engine, text_tokens(1, 100), owner="b", max_tokens=2))
        assert call.usage.cached_tokens == (96 if share else 0)


@pytest.mark.parametrize("length", [95, 96, 97, 98, 112])
def test_a_context_of_a_known_text_is_not_read_again(length: int) -> None:
    """Also where one token is left after the known blocks: there is nothing to generate from it."""
    engine, tokens = with_cache(), text_tokens(1, 112)
    expected = run(engine, submit(engine, tokens[:length], max_tokens=9)).tokens()
    read = engine.counters.read_tokens
    call = run(engine, submit(engine, tokens[:length], read_only=True, keep=True))
    assert call.failed is None and call.snapshot.tokens == length
    assert call.snapshot.position == (length - 1) // CHUNK * CHUNK
    assert engine.counters.read_tokens == read
    assert run(engine, submit(engine, start=call.snapshot, max_tokens=9)).tokens() == expected


def test_what_was_generated_is_not_taken_for_read() -> None:
    """A state after generated tokens differs in its last bits from one after reading them."""
    engine = with_cache()
    call = run(engine, submit(engine, text_tokens(1, 20), max_tokens=60, keep=True))
    whole = np.concatenate([text_tokens(1, 20), np.array([token for token, _ in call.tokens()])])
    again = run(engine, submit(engine, whole, max_tokens=3))
    assert again.usage.cached_tokens == 16
    plain = make_engine()
    assert again.tokens() == run(plain, submit(plain, whole, max_tokens=3)).tokens()


def test_states_go_to_disk_and_come_back(tmp_path: Path) -> None:
    engine = with_cache(memory=1, folder=tmp_path, disk=1 << 24)
    expected = run(engine, submit(engine, text_tokens(1, 100), max_tokens=5)).tokens()
    engine.close()
    again = with_cache(memory=1 << 24, folder=tmp_path, disk=1 << 24)
    call = run(again, submit(again, text_tokens(1, 100), max_tokens=5))
    assert call.tokens() == expected and call.usage.cached_tokens == 96
    again.close()


# --- order and limits -----------------------------------------------------------------------------------------------


def test_a_long_text_does_not_hold_up_others() -> None:
    engine = make_engine()
    long = submit(engine, text_tokens(1, 4000), owner="long", max_tokens=1)
    for _ in range(3):
        engine.step()
    short = submit(engine, text_tokens(2, 10), owner="short", max_tokens=10)
    steps = 0
    while not short.done:
        read = engine.counters.read_tokens
        engine.step()
        assert engine.counters.read_tokens - read <= engine.piece, "a step reads one piece at most"
        steps += 1
    assert steps <= 14 and not long.done


def test_texts_that_never_arrive_hold_up_no_answers() -> None:
    engine = make_engine(slots=16, queue_length=200)
    stalled = [submit(engine, TokenFeed(), owner="slow", read_only=True) for _ in range(READERS_PER_SLOT * 16 + 3)]
    engine.step()
    assert engine.waiting == 3, "so many may read, and no more"
    assert run(engine, submit(engine, text_tokens(1, 20), owner="quick", max_tokens=5), steps=20).tokens()
    stalled[0].request.cancel()
    engine.step()
    assert engine.waiting == 2


def test_owners_take_turns() -> None:
    engine = make_engine(slots=16)
    greedy = [submit(engine, text_tokens(i, 5), owner="greedy", max_tokens=20) for i in range(64)]
    engine.step()
    modest = submit(engine, text_tokens(1, 5), owner="modest", max_tokens=20)
    run(engine, modest)
    assert sum(call.done for call in greedy) <= 40


def test_full_queue_and_closing_are_refused() -> None:
    engine = make_engine(queue_length=2)
    calls = [submit(engine, text_tokens(1, 5)) for _ in range(2)]
    with pytest.raises(QueueFullError, match="2 requests"):
        submit(engine, text_tokens(1, 5))
    engine.step()
    submit(engine, text_tokens(1, 5))
    run(engine, *calls)
    engine.close()
    with pytest.raises(StoppingError):
        submit(engine, text_tokens(1, 5))


def test_cancelling_frees_the_slot_before_the_next_step() -> None:
    engine = make_engine()
    calls = [submit(engine, text_tokens(i, 20), max_tokens=1000) for i in range(16)]
    for _ in range(60):
        engine.step()
    assert engine.counters.generating == 16
    waiting = submit(engine, text_tokens(1, 20), max_tokens=3)
    calls[3].request.cancel()
    engine.step()
    assert engine.counters.generating == 15 or waiting.events
    run(engine, waiting)
    assert calls[3].failed is not None and calls[3].failed.failure is Failure.cancelled
    for call in calls:
        call.request.cancel()
    engine.step()
    assert engine.idle and not engine.counters.generating


def test_time_limit_and_length_limit() -> None:
    engine = make_engine()
    late = submit(engine, text_tokens(1, 20), max_tokens=10**6, seconds=0.05)
    run(engine, late)
    assert late.failed is not None and late.failed.failure is Failure.timeout
    long = run(engine, submit(engine, text_tokens(1, 200), max_prompt_tokens=100, max_tokens=1))
    assert long.failed is not None and long.failed.failure is Failure.too_long
    unread = replace(run(engine, submit(engine, text_tokens(1, 20), read_only=True, keep=True)).snapshot, tail=())
    nothing = run(engine, submit(engine, start=unread, max_tokens=1))
    assert nothing.failed is not None and nothing.failed.failure is Failure.empty, "there is no token to go on from"
    empty = run(engine, submit(engine, max_tokens=1))
    assert empty.failed is not None and empty.failed.failure is Failure.empty
    assert engine.idle


def test_more_choices_than_slots_are_refused_and_many_choices_are_not_starved() -> None:
    engine = make_engine()
    with pytest.raises(ValueError, match="16 slots"):
        submit(engine, text_tokens(1, 5), choices=17)
    first = [submit(engine, text_tokens(i, 5), max_tokens=20) for i in range(4)]
    engine.step()
    wide = submit(engine, text_tokens(1, 5), choices=16, max_tokens=3)
    later = [submit(engine, text_tokens(i, 5), max_tokens=20) for i in range(4)]
    run(engine, wide)
    assert all(call.done for call in first) and not any(call.done for call in later)


def test_one_bad_request_harms_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    good = submit(engine, text_tokens(1, 20), max_tokens=20)
    bad = submit(engine, text_tokens(2, 20), max_tokens=20)
    for _ in range(6):
        engine.step()
    slot = next(slot for slot, one in engine.decoding._occupants.items() if one.work.request is bad.request)
    with torch.inference_mode():
        engine.decoder.layers[0].h[slot] = torch.nan
    run(engine, good, bad)
    assert bad.failed is not None and bad.failed.failure is Failure.internal and "finite" in bad.failed.message
    fresh = make_engine()
    assert good.tokens() == run(fresh, submit(fresh, text_tokens(1, 20), max_tokens=20)).tokens()


def test_a_failing_step_fails_its_requests_and_the_engine_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    call = submit(engine, text_tokens(1, 20), max_tokens=20)
    step = engine.decoder.step
    monkeypatch.setattr(engine.decoder, "step", lambda *_: 1 / 0)
    run(engine, call)
    assert call.failed is not None and call.failed.failure is Failure.internal
    monkeypatch.setattr(engine.decoder, "step", step)
    assert run(engine, submit(engine, text_tokens(1, 20), max_tokens=20)).tokens()


def test_a_defect_of_a_step_leaves_the_engine_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    decode = engine.decoding.step

    def defect() -> bool:
        monkeypatch.setattr(engine.decoding, "step", decode)
        raise ZeroDivisionError

    monkeypatch.setattr(engine.decoding, "step", defect)
    failed = submit(engine, text_tokens(1, 20), max_tokens=20)
    engine.start()
    while not failed.done:
        threading.Event().wait(0.01)
    assert failed.failed is not None and failed.failed.failure is Failure.internal
    call = submit(engine, text_tokens(1, 20), max_tokens=20)
    engine.close(seconds=60)
    assert call.tokens()


# --- text -----------------------------------------------------------------------------------------------------------


def test_text_equals_that_of_the_session_and_cuts_no_character() -> None:
    model = make_model()
    session = Session(model, seed=2)
    session.read(text_tokens(1, 30))
    expected = "".join(generate_text(session, ByteTokenizer(), 60, Sampling(0)))
    engine = make_engine(model)
    call = run(engine, submit(engine, text_tokens(1, 30), max_tokens=60, sampling=Sampling(0)))
    assert call.text() == expected


def test_a_stop_string_ends_the_text_and_is_not_shown() -> None:
    engine = make_engine()
    whole = run(engine, submit(engine, text_tokens(1, 30), max_tokens=60)).text()
    stop = whole[10:12]
    call = run(engine, submit(engine, text_tokens(1, 30), max_tokens=60, stop=(stop,)))
    ended = next(event for event in call.events if isinstance(event, Ended))
    assert call.text() == whole[: whole.index(stop)] and ended.reason is FinishReason.stop


def test_the_end_of_the_document_ends_the_text() -> None:
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token is as likely as any other
    engine = make_engine(model)
    calls = [submit(engine, text_tokens(i, 5), seed=i, max_tokens=2000, ignore_end=False) for i in range(4)]
    run(engine, *calls)
    for call in calls:
        tokens = [token for token, _ in call.tokens()]
        assert 0 not in tokens and len(tokens) < 2000
        assert next(event for event in call.events if isinstance(event, Ended)).reason is FinishReason.stop


def test_log_probabilities_are_the_models() -> None:
    model = make_model()
    engine = make_engine(model)
    call = run(engine, submit(engine, text_tokens(1, 30), max_tokens=5, logprobs=3))
    tokens = [token for event in call.events if isinstance(event, Delta) for token in event.tokens]
    ids = torch.tensor([[*text_tokens(1, 30), *(token.token for token in tokens)]])
    with torch.no_grad():
        logprobs = model(ids).logits[0, 29:-1].log_softmax(-1)
    for row, token in zip(logprobs, tokens, strict=True):
        assert token.logprob == pytest.approx(float(row[token.token]), abs=1e-4)
        assert [one for one, _ in token.likeliest] == row.topk(3).indices.tolist()


def test_generation_out_of_range() -> None:
    for changes, message in (
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"choices": 0}, "choices"),
        ({"stop": ("",)}, "stop"),
    ):
        with pytest.raises(ValueError, match=message):
            Generation(**changes)
    with pytest.raises(ValueError, match="queue_length"):
        make_engine(queue_length=0)
    with pytest.raises(ValueError, match="piece is 0"):
        make_engine(piece=0)


# --- streams and threads --------------------------------------------------------------------------------------------


def test_a_text_that_arrives_slowly_equals_one_that_is_there() -> None:
    engine = make_engine()
    expected = run(engine, submit(engine, text_tokens(1, 200), max_tokens=10)).tokens()
    feed = TokenFeed()
    call = submit(engine, feed, max_tokens=10)
    for start in range(0, 200, 7):
        feed.put(text_tokens(1, 200)[start : start + 7])
        engine.step()
    feed.close()
    assert run(engine, call).tokens() == expected


def test_a_feed_holds_no_more_than_it_may() -> None:
    feed = TokenFeed(capacity=10)
    assert feed.put(np.arange(8)) and feed.put(np.arange(8))
    with pytest.raises(TimeoutError):
        feed.put(np.arange(8), timeout=0.01)
    assert len(feed.take()[0]) == 16 and feed.put(np.arange(8))
    feed.abandon()
    assert not feed.put(np.arange(8))


def test_threads_submit_while_the_engine_runs() -> None:
    engine = make_engine().start()
    expected = make_engine()
    wanted = run(expected, submit(expected, text_tokens(1, 40), max_tokens=15)).tokens()
    calls: list[Call] = []

    def work() -> None:
        for _ in range(5):
            calls.append(submit(engine, text_tokens(1, 40), max_tokens=15))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.close(seconds=60)
    assert len(calls) == 20 and all(call.tokens() == wanted for call in calls)


def test_closing_at_once_fails_what_runs() -> None:
    engine = make_engine().start()
    call = submit(engine, text_tokens(1, 40), max_tokens=10**6)
    engine.close()
    assert call.failed is not None and call.failed.failure is Failure.stopping


def test_pieces_fit_the_chunk() -> None:
    assert [(make_engine(piece=n).block, make_engine(piece=n).piece) for n in (1, 7, 16, 33)] == [
        (16, 1),
        (16, 4),
        (16, 16),
        (32, 32),
    ]


def test_memory_does_not_grow_with_the_text() -> None:
    engine = make_engine()
    sizes = {
        run(engine, submit(engine, text_tokens(1, n), read_only=True, keep=True)).snapshot.nbytes for n in (65, 1025)
    }
    assert len(sizes) == 1


# --- weights that change --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["data", "fused optimiser"])
def test_requests_are_served_by_the_weights_as_they_are(way: str) -> None:
    model = make_model()
    engine = with_cache(model=model)
    text = text_tokens(3, 3 * CHUNK)
    before = run(engine, submit(engine, text, max_tokens=12)).tokens()
    under_way = submit(engine, text_tokens(4, 9), max_tokens=500)
    engine.step()
    for p in model.parameters():
        if way == "data":
            p.data.mul_(1.2)
        else:
            p.grad = torch.ones_like(p)
    if way != "data":
        torch.optim.AdamW(model.parameters(), 0.05, fused=True).step()
    after = run(engine, submit(engine, text, max_tokens=12)).tokens()
    other = make_engine(model)
    assert after == run(other, submit(other, text, max_tokens=12)).tokens() != before
    assert under_way.failed is not None and "weights were changed" in under_way.failed.message
    assert run(engine, submit(engine, text, max_tokens=12)).tokens() == after
