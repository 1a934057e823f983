"""Stop strings are found wherever the pieces are cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalodon.inference import StopStrings

texts = st.text("ab", max_size=30)


def cut(text: str, places: list[int]) -> list[str]:
    ends = sorted({min(place, len(text)) for place in places} | {0, len(text)})
    return [text[start:end] for start, end in itertools.pairwise(ends)]


@given(
    text=texts,
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    places=st.lists(st.integers(0, 30)),
)
def test_output_ends_before_the_first_stop_string(text: str, stops: list[str], places: list[int]) -> None:
    stopping = StopStrings(stops)
    shown = ""
    for piece in cut(text, places):
        shown += stopping.feed(piece)
        assert stopping.stopped or text.startswith(shown)
    shown += stopping.flush()
    found = [text.find(stop) for stop in stops if stop in text]
    assert stopping.stopped == bool(found)
    # pieces that hold a later stop string whole can end before a longer one that began earlier is complete
    ends = min((text.find(stop) + len(stop) for stop in stops if stop in text), default=None)
    if ends is None:
        assert shown == text
    else:
        assert not any(stop in shown for stop in stops) and text.startswith(shown) and len(shown) < ends


@given(before=texts, text=texts, stop=st.text("ab", min_size=1, max_size=4))
def test_a_stop_string_may_begin_in_earlier_text(before: str, text: str, stop: str) -> None:
    stopping = StopStrings([stop], before)
    shown = "".join(stopping.feed(character) for character in text) + stopping.flush()
    place = (before + text).find(stop, max(0, len(before) - len(stop) + 1))
    assert stopping.stopped == (place >= 0)
    assert shown == (text if place < 0 else text[: max(0, place - len(before))])


def test_nothing_is_held_back_that_cannot_begin_a_stop_string() -> None:
    stopping = StopStrings(["\nUser:"])
    assert stopping.feed("Hello") == "Hello"
    assert stopping.feed("\nUs") == ""
    assert stopping.feed("ual") == "\nUsual"


def test_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="stop"):
        StopStrings(["a", ""])
