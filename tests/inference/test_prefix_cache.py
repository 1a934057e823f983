"""The store of states: bounded bytes, the densest given up first, and what nobody asks for in the end."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from engine_cases import make_engine, run, submit, text_tokens
from megalodon.inference.prefix_cache import PrefixStore


@dataclass(eq=False)
class FakeState:
    """As much of a state as the store looks at."""

    position: torch.Tensor
    nbytes: int = 1


def state(position: int = 0, size: int = 1) -> FakeState:
    return FakeState(torch.tensor([position]), size)


@pytest.fixture
def identity():
    return make_engine().identity


def read(store: PrefixStore, text: str, end: int, step: int = 1, start: int = 1) -> list[tuple[int, str]]:
    """Keep the states of a text at every `step` tokens."""
    path: list[tuple[int, str]] = []
    for position in range(start, end + 1, step):
        key = f"{text}{position}"
        store.put(key, state(position), position, end, path)
        path.append((position, key))
    return path


def left(store: PrefixStore, path: list[tuple[int, str]]) -> list[int]:
    return [position for position, key in path if key in store]


def test_bytes_are_bounded_and_what_is_left_grows_apart_from_the_end(identity) -> None:
    store = PrefixStore(identity, 24)
    path = read(store, "a", 400)
    assert store.counters.memory_bytes == store.counters.memory_entries == len(left(store, path)) == 24
    places = left(store, path)
    gaps = np.diff([0, *places, 400])
    early, late = gaps[: len(gaps) // 2], gaps[len(gaps) // 2 :]
    assert places[-1] == 400 and early.mean() > 3 * late.mean(), (places, gaps)
    assert max(gaps) < 100, "no stretch is given up altogether"


def test_the_densest_text_is_thinned_before_others_lose_anything(identity) -> None:
    store = PrefixStore(identity, 40)
    sparse, dense = read(store, "sparse", 1000, step=100, start=100), read(store, "dense", 60)
    assert len(left(store, sparse)) == 10 and len(left(store, dense)) == 30


def test_what_nobody_asks_for_goes_in_the_end(identity) -> None:
    store = PrefixStore(identity, 20)
    old, used = read(store, "old", 500, step=100, start=100), read(store, "used", 500, step=100, start=100)
    for number in range(400):
        read(store, f"new{number} ", 100, step=50, start=50)
        store.follow(used, 500, [key for _, key in used])
    assert left(store, old) == [] and left(store, used)[-3:] == [300, 400, 500]


def test_where_texts_part_is_worth_more(identity) -> None:
    store = PrefixStore(identity, 12)
    trunk = read(store, "t", 40, step=10, start=10)
    for branch in ("x", "y"):
        store.put(f"{branch}25", state(), 25, 40, trunk[:2])
    assert store.leaves("t20") == 25 and store.leaves("t40") is None and store.leaves("none") is None
    assert store._kept["t20"].worth == 10 > store._kept["t10"].worth


def test_neighbours_close_up(identity) -> None:
    store = PrefixStore(identity, 100)
    path = read(store, "a", 50, step=10, start=10)
    worth = store._kept["a30"].worth
    store.drop("a20")
    assert left(store, path) == [10, 30, 40, 50] and store.counters.memory_bytes == 4
    assert store._kept["a30"].before is store._kept["a10"] and store._kept["a30"].worth > worth
    store.follow(path, 50, ["a30"])
    store.drop("a30")
    store.drop("nothing")
    assert "a30" in store, "another text has gone its way"


def test_any_order_keeps_the_books(identity, tmp_path: Path) -> None:
    engine = make_engine()
    kept = run(engine, submit(engine, text_tokens(1, 100), read_only=True, keep=True)).snapshot.state
    store, rng = PrefixStore(identity, 5 * kept.nbytes, tmp_path, 40_000), random.Random(0)
    texts = {text: [(at, f"{text}{at:063x}") for at in range(1, 30)] for text in "abc"}
    for _ in range(600):
        path = texts[rng.choice("abc")]
        at = rng.randrange(len(path))
        match rng.randrange(4):
            case 0 | 1:
                store.put(path[at][1], kept, path[at][0], 30, path[:at])
            case 2:
                store.follow(path, 30, [path[at][1]])
            case _:
                found = store.get(path[at][1])  # which the writer's thread may give up right after
                assert found is None or torch.equal(found.position, kept.position)
                store.drop(path[at][1])
    store.close()
    entries, counters = store._kept.values(), store.counters
    assert counters.memory_bytes == sum(one.memory for one in entries) <= 5 * kept.nbytes
    assert counters.disk_bytes == sum(one.disk for one in entries) <= 40_000
    assert counters.memory_entries == sum(one.memory > 0 for one in entries)
    assert counters.disk_entries == sum(one.disk > 0 for one in entries) == len(list(tmp_path.iterdir()))
    for one in entries:
        assert one.memory or one.disk
        assert one.before is None or (one in one.before.after and one.before.position < one.position)
        assert all(other.before is one and other.key in store for other in one.after)


def test_files_are_found_again_and_damaged_ones_are_not_used(identity, tmp_path: Path) -> None:
    engine = make_engine()
    kept = run(engine, submit(engine, text_tokens(1, 100), read_only=True, keep=True)).snapshot.state
    keys = [f"{number:064x}" for number in range(3)]
    store = PrefixStore(identity, 1, tmp_path, 1 << 24)
    for number, key in enumerate(keys):
        store.put(key, kept, 10 * number, 100)
    store.close()
    assert store.counters.disk_entries == 3 and store.counters.memory_entries == 0
    again = PrefixStore(identity, 1 << 24, tmp_path, 1 << 24)
    damaged = next(tmp_path.glob(f"{keys[1]}*"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert again.get(keys[0], only_memory=True) is None
    assert again.get(keys[0]) is not None and again.get(keys[0], only_memory=True) is not None
    assert again.get(keys[1]) is None and keys[1] not in again and not damaged.exists()
    again.close()
    small = PrefixStore(identity, 1, tmp_path, 1)
    assert small.counters.disk_entries == small.counters.disk_bytes == 0 and not list(tmp_path.iterdir())


def test_news_tells_what_was_kept_since(identity) -> None:
    store = PrefixStore(identity, 100)
    told = store.told
    read(store, "a", 3)
    news, told = store.news(told)
    assert sorted(news) == ["a1", "a2", "a3"] and store.news(told) == ([], told)
