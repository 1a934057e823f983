"""Which states of a text are worth keeping: near every place where it may be left, and few of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalodon.data import ByteTokenizer
from megalodon.inference.branching import MOST_APART, message_starts, spacing


def kept(end: int, block: int) -> list[int]:
    return [at for at in range(block, end, block) if at % spacing(end - at, block) == 0]


@given(end=st.integers(1, 60_000), block=st.sampled_from([16, 48, 512]), data=st.data())
def test_whoever_changes_a_text_reads_at_most_an_eighth_more(end: int, block: int, data: st.DataObject) -> None:
    change = data.draw(st.integers(0, end - 1))
    before = max([0, *(at for at in kept(end, block) if at <= change)])
    assert change - before <= (end - change) / 8 or change - before < block


@given(end=st.integers(1, 60_000), more=st.integers(0, 60_000), block=st.sampled_from([16, 512]))
def test_a_text_that_grows_only_gives_some_up(end: int, more: int, block: int) -> None:
    assert set(kept(end + more, block)) & set(range(end)) <= set(kept(end, block))


def test_few_are_kept_and_they_are_never_very_far_apart() -> None:
    assert len(kept(100_000, 512)) < 55
    far = kept(4_000_000, 512)
    assert max(np.diff(far)) == MOST_APART and len(far) < 4_000_000 / MOST_APART + 90
    assert spacing(10**9, 3 * MOST_APART) == 3 * MOST_APART, "a block may be larger"


def test_where_messages_begin() -> None:
    tokenizer = ByteTokenizer()
    contents = ["Grüße", "hello", "  hello ", "", "again"]
    text = "".join(f"\nuser: {content}" for content in contents)
    starts = message_starts(tokenizer, tokenizer.encode(text), contents)
    raw = text.encode()
    assert [raw[start : start + 3] for start in starts] == [b"Gr\xc3", b"hel", b"hel", b"aga"]
    assert starts == sorted(starts) and message_starts(tokenizer, tokenizer.encode("other"), ["hello"]) == []


def test_no_marks_without_the_bytes_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = ByteTokenizer()
    monkeypatch.setattr(tokenizer, "token_bytes", None)
    assert message_starts(tokenizer, np.array([1, 2]), ["a"]) == []
