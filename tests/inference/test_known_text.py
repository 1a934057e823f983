"""Known beginnings: found in one pass beside the engine, and kept where texts part."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from engine_cases import CHUNK, Call, make_engine, make_model, run, submit, text_tokens
from megalodon.inference import known_text
from megalodon.inference.engine import Engine
from megalodon.inference.feed import TokenFeed
from megalodon.inference.prefix_cache import PrefixStore


def with_store(memory: int = 1 << 26, **options: object) -> Engine:
    return make_engine(prefixes=lambda identity: PrefixStore(identity, memory), **options)


def changed(tokens: np.ndarray, at: int) -> np.ndarray:
    """The same text with another token at `at`, and others after it."""
    other = tokens.copy()
    other[at] = 1 + other[at] % 127
    other[at + 1 :] = text_tokens(at, len(tokens) - at - 1)
    return other


# --- divergent prompts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_changed_text_costs_an_eighth_more_than_the_change_and_equals_a_cold_one(dtype: torch.dtype) -> None:
    model, length = make_model(dtype), 1200
    tokens = text_tokens(1, length)
    for at in (1190, 720, 100):
        engine = with_store(model=model)
        run(engine, submit(engine, tokens, max_tokens=3))
        other = changed(tokens, at)
        call = run(engine, submit(engine, other, max_tokens=8))
        assert at - call.usage.cached_tokens <= (length - at) / 8 + CHUNK and call.usage.cached_tokens <= at
        cold = make_engine(model)
        assert call.tokens() == run(cold, submit(cold, other, max_tokens=8)).tokens()


def test_a_text_that_arrived_slowly_is_kept_as_well() -> None:
    engine, tokens, feed = with_store(), text_tokens(1, 1500), TokenFeed()
    call = submit(engine, feed, max_tokens=3)
    for start in range(0, 1500, 50):
        feed.put(tokens[start : start + 50])
        for _ in range(4):
            engine.step()
    feed.close()
    run(engine, call)
    assert engine.prefixes is not None and engine.prefixes.counters.memory_entries < 55
    for at in (1400, 500):
        again = run(engine, submit(engine, changed(tokens, at), max_tokens=3))
        assert at - again.usage.cached_tokens <= (1500 - at) / 8 + CHUNK


def test_states_are_kept_where_messages_begin() -> None:
    engine, tokens, marks = with_store(), text_tokens(1, 1000), [100, 333, 334]
    run(engine, submit(engine, TokenFeed(tokens, marks=marks), max_tokens=3))
    for at in marks:
        call = run(engine, submit(engine, changed(tokens, at), max_tokens=3))
        assert call.usage.cached_tokens == at // CHUNK * CHUNK


def test_marks_count_from_where_a_context_ends() -> None:
    engine, tokens = with_store(), text_tokens(1, 1500)
    start = run(engine, submit(engine, tokens[:50], read_only=True, keep=True)).snapshot
    run(engine, submit(engine, TokenFeed(tokens[50:], marks=[283]), start, max_tokens=3))
    call = run(engine, submit(engine, changed(tokens, 333), max_tokens=3))
    assert call.usage.cached_tokens == 320


def test_a_place_that_was_left_once_is_cheaper_to_leave_again() -> None:
    engine, tokens, at = with_store(), text_tokens(1, 3000), 1000
    run(engine, submit(engine, tokens, max_tokens=1))
    costs = []
    for turn in range(2):
        other = changed(tokens, at)[: at + 100]
        other[at] = 100 + turn
        costs.append(at - run(engine, submit(engine, other, max_tokens=1)).usage.cached_tokens)
    assert costs[0] > 2 * CHUNK and costs[1] <= costs[0] / 8 + CHUNK


def test_a_small_store_still_serves_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    size = run(engine := with_store(), submit(engine, text_tokens(1, 65), read_only=True, keep=True)).snapshot.nbytes
    engine, tokens = with_store(memory=12 * size), text_tokens(1, 3000)
    run(engine, submit(engine, tokens, max_tokens=1))
    assert engine.prefixes is not None and engine.prefixes.counters.memory_bytes <= 12 * size
    late = run(engine, submit(engine, changed(tokens, 2990), max_tokens=1))
    assert late.usage.cached_tokens >= 2900
    middle = run(engine, submit(engine, changed(tokens, 1500), max_tokens=1))
    assert middle.usage.cached_tokens >= 500


# --- the look-up ----------------------------------------------------------------------------------------------------


def test_every_block_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, count = with_store(), 0
    contains = PrefixStore.__contains__

    def counted(store: PrefixStore, key: str) -> bool:
        nonlocal count
        count += 1
        return contains(store, key)

    monkeypatch.setattr(PrefixStore, "__contains__", counted)
    run(engine, submit(engine, text_tokens(1, 4000), read_only=True))
    assert count == 4000 // CHUNK - 1


def test_a_long_text_is_looked_up_beside_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is, others go on; and a step with nothing else to do waits for it."""
    monkeypatch.setattr(known_text, "AT_ONCE", 100)
    engine = with_store()
    tokens = text_tokens(1, 2000)
    expected = run(engine, submit(engine, tokens, max_tokens=5)).tokens()
    held, threads, look = threading.Event(), set(), known_text.KnownText._hash

    def slow(text: known_text.KnownText, part: np.ndarray) -> list[str]:
        if threading.current_thread() is not threading.main_thread():
            threads.add(threading.current_thread())
            held.wait()
        return look(text, part)

    monkeypatch.setattr(known_text.KnownText, "_hash", slow)
    long = submit(engine, tokens, max_tokens=5)
    engine.step()
    short = run(engine, submit(engine, text_tokens(2, 20), max_tokens=5))
    assert short.tokens() and not long.done and not long.progress and len(threads) == 1
    held.set()
    assert run(engine, long).tokens() == expected and long.usage.cached_tokens == 1984
    engine.close()


def test_a_look_up_that_fails_fails_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_text, "AT_ONCE", 100)
    engine = with_store()
    look = known_text.KnownText._hash
    monkeypatch.setattr(known_text.KnownText, "_hash", lambda *_: 1 / 0)
    bad = run(engine, submit(engine, text_tokens(1, 2000), max_tokens=5))
    monkeypatch.setattr(known_text.KnownText, "_hash", look)
    good = run(engine, submit(engine, text_tokens(1, 2000), max_tokens=5))
    assert bad.failed is not None and good.tokens()


def test_the_engine_wakes_when_a_look_up_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_text, "AT_ONCE", 100)
    engine = with_store().start()
    calls: list[Call] = [submit(engine, text_tokens(1, 2000), max_tokens=3) for _ in range(3)]
    engine.close(seconds=60)
    assert all(call.tokens() for call in calls) and calls[0].tokens() == calls[1].tokens() == calls[2].tokens()


def test_who_reads_the_same_text_at_the_same_time_profits() -> None:
    engine, tokens = with_store(), text_tokens(1, 2000)
    first = submit(engine, tokens, max_tokens=3)
    for _ in range(50):
        engine.step()
    second = submit(engine, tokens, max_tokens=3)
    run(engine, first, second)
    assert first.tokens() == second.tokens() and second.usage.cached_tokens > 700


def test_a_known_text_that_arrives_in_pieces_is_not_read_again() -> None:
    engine, tokens, feed = with_store(), text_tokens(1, 3000), TokenFeed()
    expected = run(engine, submit(engine, tokens, max_tokens=3)).tokens()
    read = engine.counters.read_tokens
    call = submit(engine, feed, max_tokens=3)
    for start in range(0, 3000, 1000):
        feed.put(tokens[start : start + 1000])
        engine.step()
    feed.close()
    assert run(engine, call).tokens() == expected
    assert engine.counters.read_tokens - read <= CHUNK and call.usage.cached_tokens == 2992
