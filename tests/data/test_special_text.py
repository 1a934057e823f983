"""Texts with special tokens, encoded piece by piece: for every kind of tokenizer the ids are those of one call."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_cutting import ALPHABET, MAKERS, SAMPLE
from tokenizers import AddedToken

from megalodon.data import cutting, pretrained
from megalodon.data.pretrained import PretrainedTokenizer
from megalodon.data.special_text import SpecialText, _overlap

BEGIN, END, WIDE, WORD = "<|begin|>", "<|end|>", "<|wide|>", "<|word|>"
KINDS = [kind for kind in MAKERS if kind != "bytes"]
PARTS = [*ALPHABET, BEGIN, END, WIDE, WORD, " \n \x1c", "abcat " * 9]
TEXT = st.lists(st.sampled_from(PARTS), max_size=60).map("".join)


def with_tokens(kind: str, added: list[AddedToken | str]) -> PretrainedTokenizer:
    plain = MAKERS[kind]()
    plain.transformers.add_special_tokens({"additional_special_tokens": added})
    return PretrainedTokenizer(plain.transformers, kind)


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request) -> PretrainedTokenizer:
    wide = AddedToken(WIDE, lstrip=True, rstrip=True, special=True)
    made = with_tokens(request.param, [BEGIN, END, wide])
    made.transformers.add_tokens([WORD])  # no special token, found in text all the same
    return PretrainedTokenizer(made.transformers, request.param)


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "CUT_CHARACTERS", 30)
    monkeypatch.setattr(cutting, "CONTEXT", 24)


def check(tokenizer: PretrainedTokenizer, text: str, characters: int) -> None:
    expected = tokenizer.transformers.encode(text, add_special_tokens=False)
    assert SpecialText(tokenizer, characters).encode(text).tolist() == expected


@settings(max_examples=40)
@given(text=TEXT, characters=st.integers(1, 60))
@example(text=f"{BEGIN}user\nabcat abcat{END}\n" * 30, characters=50)
@example(text="abcat " * 40 + END + " abcat" * 40 + END + "abcat." * 40, characters=30)
@example(text="  ab " + WIDE + "  " * 40 + "ab" + "\n" * 90 + WIDE, characters=20)
@example(text=BEGIN + "1234567" * 30 + END + "\u3000" + WIDE + "\x1c" + WIDE, characters=20)
@example(text=END + "cat" * 5 + "\x1c" + WIDE, characters=20)
@example(text=BEGIN[:-1] + BEGIN + BEGIN[1:] + END * 20, characters=5)
def test_the_ids_are_those_of_one_call(tokenizer, text, characters):
    check(tokenizer, text, characters)


@pytest.mark.parametrize("text", [BEGIN + (SAMPLE[0] + SAMPLE[1] + SAMPLE[2]) * 2 + END, SAMPLE[0] * 3 + END])
def test_a_long_part_between_two_tokens_is_cut(tokenizer, text, monkeypatch):
    check(tokenizer, text, 500)
    if tokenizer._backend is None:
        return  # written in Python: others run meanwhile
    lengths, special = [], SpecialText(tokenizer, 500)
    whole = special._whole
    monkeypatch.setattr(special, "_whole", lambda text: (lengths.append(len(text)), whole(text))[1])
    special.encode(text)
    assert max(lengths) < 1200, "and no call has all of it"


@pytest.mark.parametrize(
    "added",
    [
        [AddedToken(WORD, single_word=True, special=True)],
        [AddedToken("ab", normalized=True, special=True)],
        [AddedToken("<a", normalized=False, special=True), AddedToken("a>", normalized=True, special=True)],
        [AddedToken("  ", lstrip=True, special=True), BEGIN],
        [],
    ],
)
@pytest.mark.parametrize("kind", ["gpt2", "qwen, NFC", "llama 2"])
def test_tokens_that_are_found_in_other_ways(kind, added):
    tokenizer = with_tokens(kind, added)
    for text in (f"ab {WORD} a{WORD}b abcat <a> " * 20, "a  b   c <a> a> <a ab" * 20):
        check(tokenizer, text, 30)


def test_overlaps():
    assert _overlap("<a", "a>") and _overlap("a>", "<a") and _overlap("<a>", "a")
    assert not _overlap("<a>", "<b>")


def test_ids_are_int32_also_of_nothing():
    tokenizer = with_tokens("gpt2", [BEGIN])
    for text in ("", BEGIN, "abc " * 100):
        ids = SpecialText(tokenizer, 30).encode(text)
        assert ids.dtype == np.int32 and (len(ids) > 0) == bool(text)
