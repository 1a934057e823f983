"""Held-out splits: by document, near the fraction asked for, the same for the same seed, never empty."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from megalodon.data import (
    ByteTokenizer,
    CorpusConfig,
    DocumentSet,
    HeldOutConfig,
    TokenizedCorpus,
    check_sizes,
    prepare_documents,
    split_documents,
)


def corpus_of(lengths: list[int]) -> TokenizedCorpus:
    return TokenizedCorpus.from_documents(
        [(f"d{i}", chr(97 + i % 26) * length) for i, length in enumerate(lengths)], ByteTokenizer()
    )


@given(
    lengths=st.lists(st.integers(0, 60), min_size=2, max_size=30),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 9),
)
def test_every_document_is_on_one_side_whole(lengths, fraction, seed):
    corpus = corpus_of(lengths)
    training, held_out = split_documents(corpus, fraction=fraction, seed=seed)
    assert sorted([*training.indices, *held_out.indices]) == list(range(len(lengths)))
    assert len(training) and len(held_out)
    for part in (training, held_out):
        assert all(np.array_equal(part.tokens(i), corpus.document(part.indices[i])) for i in range(len(part)))
        assert part.num_bytes == sum(lengths[i] for i in part.indices)
    again = split_documents(corpus, fraction=fraction, seed=seed)
    assert again[1].fingerprint() == held_out.fingerprint() != training.fingerprint()


def test_the_fraction_is_met_when_documents_are_many_and_one_is_huge():
    texts = [("long", "x" * 50_000), *((f"d{i}", f"{i:04}" * 25) for i in range(500))]
    corpus = TokenizedCorpus.from_documents(texts, ByteTokenizer())
    for seed in range(5):
        _, held_out = split_documents(corpus, fraction=0.1, seed=seed)
        assert held_out.num_tokens / corpus.num_tokens == pytest.approx(0.1, abs=0.002)
        assert 0 not in held_out.indices
    assert len({split_documents(corpus, fraction=0.1, seed=seed)[1].fingerprint() for seed in range(5)}) == 5


def test_where_no_document_is_small_enough_the_smallest_is_taken():
    _, held_out = split_documents(corpus_of([900, 500, 800]), fraction=0.01)
    assert held_out.indices.tolist() == [1]


def test_a_number_of_documents():
    training, held_out = split_documents(corpus_of([5] * 9), documents=4)
    assert (len(training), len(held_out)) == (5, 4)
    with pytest.raises(ValueError, match="documents is 9; the corpus has 9, so give 1 to 8"):
        split_documents(corpus_of([5] * 9), documents=9)


def test_a_single_document_keeps_its_tail_out():
    text = "".join(chr(97 + i % 26) for i in range(199))
    corpus = TokenizedCorpus.from_documents([("only", text)], ByteTokenizer())
    training, held_out = split_documents(corpus, fraction=0.1)
    assert ByteTokenizer().decode(training.tokens(0)) == text[:180]
    assert ByteTokenizer().decode(held_out.tokens(0)) == text[180:]
    assert (held_out.num_tokens, held_out.num_bytes, training.num_bytes) == (20, 19, 180)
    assert training.name(0) == held_out.name(0) == "only"


def test_too_small_a_set_is_refused():
    training, held_out = split_documents(corpus_of([100] * 10 + [3]), fraction=0.003)
    check_sizes(training, held_out, 3)
    with pytest.raises(ValueError, match=r"held-out set is too small: 4 tokens in 1 documents.*needs at least 5"):
        check_sizes(training, held_out, 4)
    with pytest.raises(ValueError, match="training set is too small"):
        check_sizes(held_out, training, 64)
    nothing, _ = split_documents(corpus_of([1]), fraction=0.9)
    with pytest.raises(ValueError, match="training set is too small: 0 tokens in 0 documents"):
        check_sizes(nothing, training, 2)


def test_the_config_takes_one_way():
    assert HeldOutConfig().fraction == 0.05
    assert HeldOutConfig(documents=2).fraction is None
    assert HeldOutConfig.model_validate({"corpus": {"source": "stdlib"}}).corpus == CorpusConfig(source="stdlib")
    with pytest.raises(ValidationError, match="fraction and documents were given"):
        HeldOutConfig(fraction=0.1, documents=2)
    with pytest.raises(ValidationError, match="less than 1"):
        HeldOutConfig(fraction=1.5)
    with pytest.raises(ValueError, match=r"fraction is 1\.5"):
        split_documents(corpus_of([1, 2]), fraction=1.5)


def test_prepared_documents(tmp_path):
    for name, length in (("a", 50), ("b", 60), ("c", 70)):
        (tmp_path / f"{name}.txt").write_text(name * length)
    (tmp_path / "apart").mkdir()
    (tmp_path / "apart" / "d.txt").write_text("d" * 40)
    corpus = CorpusConfig(source=str(tmp_path / "*.txt"))
    training, held_out = prepare_documents(corpus, HeldOutConfig(documents=1), ByteTokenizer(), 16, 0, tmp_path / "c")
    assert (len(training), len(held_out)) == (2, 1)
    apart = HeldOutConfig(corpus=CorpusConfig(source=str(tmp_path / "apart")))
    training, held_out = prepare_documents(corpus, apart, ByteTokenizer(), 16, 0, tmp_path / "c")
    assert (len(training), held_out.num_tokens) == (3, 41)
    with pytest.raises(ValueError, match="held-out set is too small: 41 tokens"):
        prepare_documents(corpus, apart, ByteTokenizer(), 41, 0, tmp_path / "c")


def test_sets_of_chosen_documents_stand_in_the_corpus_order():
    chosen = DocumentSet.of(corpus_of([1, 2, 3, 4]), np.array([3, 0]))
    assert [chosen.name(i) for i in range(2)] == ["d0", "d3"] and chosen.lengths.tolist() == [2, 5]
