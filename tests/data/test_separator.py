"""Separators: found wherever pieces are cut, counted once each, and documents are cut there when asked to."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalodon.data import Corpus
from megalodon.data.separator import Counter, split_at

TEXT = st.lists(st.sampled_from([*"ab<|> ", "<|e|>", "<|e", "|>"]), max_size=40).map("".join)


def cut(text: str, size: int) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


@given(text=TEXT, size=st.integers(1, 9))
def test_parts_are_those_of_the_whole_text(text, size):
    assert ["".join(part) for part in split_at(cut(text, size), "<|e|>")] == text.split("<|e|>")


@given(text=TEXT, size=st.integers(1, 9), read=st.integers(0, 2))
def test_parts_that_are_not_read_are_passed_over(text, size, read):
    expected = text.split("<|e|>")
    for number, part in enumerate(split_at(cut(text, size), "<|e|>")):
        got = "".join(piece for _, piece in zip(range(read), part, strict=False))
        assert expected[number].startswith(got)
    assert number == len(expected) - 1


@given(text=TEXT, size=st.integers(1, 9))
def test_words_are_counted_wherever_pieces_end(text, size):
    counter = Counter(["<|e|>", "|>"])
    assert "".join(counter.through(cut(text, size))) == text
    assert counter.counts["<|e|>"] == text.count("<|e|>") and counter.counts["|>"] == text.count("|>")
    assert (counter.told() is None) == ("|>" not in text)


def test_many_separators_take_no_long_time():
    text = "x<|e|>" * 200_000
    assert sum(1 for _ in split_at([text], "<|e|>")) == 200_001


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_documents_of_a_corpus_end_there(tmp_path, name):
    text = "one\n<|endoftext|>two<|endoftext|>"
    (tmp_path / name).write_text(text if name == "a.txt" else '{"text": "one\\n<|endoftext|>two<|endoftext|>"}')
    documents = Corpus({"source": str(tmp_path), "separator": "<|endoftext|>"}).documents()
    got = [(document.name.partition("#")[2], document.text) for document in documents]
    assert got == [("0", "one\n"), ("1", "two"), ("2", "")]
    assert (
        len(list(Corpus({"source": str(tmp_path), "separator": "<|endoftext|>", "max_documents": 2}).documents())) == 2
    )
