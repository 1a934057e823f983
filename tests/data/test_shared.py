"""What is held out is not trained on: by path, by content, inside longer texts; and what is apart is let be."""

from __future__ import annotations

import gzip
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest

from megalodon.data import (
    ByteTokenizer,
    CorpusConfig,
    DocumentSet,
    HeldOutConfig,
    TokenizedCorpus,
    prepare_documents,
    split_documents,
)
from megalodon.data import shared as shared_module
from megalodon.data.bpe import train_bpe
from megalodon.data.shared import find_shared

WORDS = ["whale", "sea", "memory", "stone", "below", "of", "and", "the", "swam", "long", "water", "7", "é"]


def text(seed: int, words: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words)) + "\n"


@pytest.fixture
def corpus(tmp_path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for seed in range(4):
        (folder / f"{seed}.txt").write_text(text(seed, 200))
    return folder


def prepare(corpus, held_out, tmp_path, shared="refuse", tokenizer=None, told=None, **options):
    held = HeldOutConfig(corpus=CorpusConfig(source=str(held_out), **options), shared=shared)
    say = (told if told is not None else []).append
    cache = tmp_path / "cache"
    return prepare_documents(
        CorpusConfig(source=str(corpus)), held, tokenizer or ByteTokenizer(), 16, 0, cache, say=say
    )


def held_out_ways(corpus: Path, tmp_path: Path) -> dict[str, Path]:
    """Places where the text of 2.txt is found again."""
    content = (corpus / "2.txt").read_text()
    places = {name: tmp_path / name for name in ("copy.txt", "rows.jsonl", "link.txt", "hard.txt", "a.txt.gz", "two")}
    places["copy.txt"].write_text(content)
    places["rows.jsonl"].write_text(json.dumps({"text": text(9, 90)}) + "\n" + json.dumps({"text": content}))
    places["link.txt"].symlink_to(corpus / "2.txt")
    os.link(corpus / "2.txt", places["hard.txt"])
    places["a.txt.gz"].write_bytes(gzip.compress(content.encode()))
    places["two"].mkdir()
    (places["two"] / "new.txt").write_text(text(11, 300))
    (places["two"] / "old.txt").write_text(content)
    places["part"] = tmp_path / "part.txt"
    places["part"].write_text(content[100:900])
    places["without its end"] = tmp_path / "shorter.txt"
    places["without its end"].write_text(content.rstrip("\n"))
    return places


WAYS = ["copy.txt", "rows.jsonl", "link.txt", "hard.txt", "a.txt.gz", "two", "part", "without its end"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("which", ["bytes", "bpe"])
def test_a_held_out_corpus_that_is_part_of_the_training_corpus_is_refused(corpus, tmp_path, way, which):
    tokenizer = None if which == "bytes" else train_bpe([[text(50, 500)]], 280)
    place = held_out_ways(corpus, tmp_path)[way]
    with pytest.raises(ValueError, match=r"held_out\.corpus: .*part of the training corpus.*set held_out\.shared") as e:
        prepare(corpus, place, tmp_path, tokenizer=tokenizer)
    assert "2.txt" in str(e.value) and "\n" not in str(e.value)
    told: list[str] = []
    training, held = prepare(corpus, place, tmp_path, "remove", tokenizer, told)
    assert sorted(Path(training.name(i)).name for i in range(len(training))) == ["0.txt", "1.txt", "3.txt"]
    assert len(held) and any("1 documents with" in line and "not trained on" in line for line in told)


def test_the_reverse_and_a_book_of_all(corpus, tmp_path):
    whole = tmp_path / "all.txt"
    whole.write_text("".join((corpus / f"{i}.txt").read_text() for i in range(4)))
    with pytest.raises(ValueError, match=r"1 of its 1 documents .* such as .*2\.txt, which is in .*all\.txt"):
        prepare(whole, corpus / "2.txt", tmp_path)
    with pytest.raises(ValueError, match=r"1 documents .*all\.txt"):
        prepare(corpus, whole, tmp_path)


def test_what_is_apart_is_no_trouble(corpus, tmp_path):
    (tmp_path / "held.txt").write_text(text(77, 300))
    training, held = prepare(corpus, tmp_path / "held.txt", tmp_path)
    assert (len(training), len(held)) == (4, 1)
    licence = text(99, 40)
    (corpus / "0.txt").write_text(text(0, 200) + licence)
    (tmp_path / "held.txt").write_text(text(77, 300) + licence)
    training, _ = prepare(corpus, tmp_path / "held.txt", tmp_path)
    assert len(training) == 4
    for name in ("corpus/short.txt", "held.txt"):  # too short to mean anything
        (tmp_path / name).write_text("yes\n")
    (tmp_path / "held2.txt").write_text(text(78, 300))
    prepare(corpus, [tmp_path / "held.txt", tmp_path / "held2.txt"][1], tmp_path)


def test_other_rows_and_fields_of_one_file_are_apart(tmp_path):
    rows = [{"text": text(i, 60), "summary": text(100 + i, 60)} for i in range(6)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    training, held = prepare(path, path, tmp_path, field="summary")
    assert (len(training), len(held)) == (6, 6)
    with pytest.raises(ValueError, match="part of the training corpus by content"):
        prepare(path, path, tmp_path, max_documents=2)
    training, held = prepare(path, path, tmp_path, "remove", max_documents=2)
    assert (len(training), len(held)) == (4, 2)


def test_copies_of_a_drawn_document_are_held_out_with_it():
    texts = [("a", text(1, 50)), ("b", text(2, 50)), ("again", text(1, 50)), ("c", text(3, 50))]
    corpus = TokenizedCorpus.from_documents(texts, ByteTokenizer())
    for seed in range(8):
        for sets in (split_documents(corpus, documents=1, seed=seed), split_documents(corpus, 0.3, seed=seed)):
            names = [{documents.name(i) for i in range(len(documents))} for documents in sets]
            assert names[0] | names[1] == {"a", "b", "again", "c"} and not names[0] & names[1]
            assert any({"a", "again"} <= side for side in names)


def test_places_are_found_wherever_blocks_end(monkeypatch):
    monkeypatch.setattr(shared_module, "BLOCK", 300)
    long = text(5, 400)
    training = DocumentSet.of(TokenizedCorpus.from_documents([("x", text(6, 30)), ("long", long)], ByteTokenizer()))
    for first in range(0, len(long) - 200, 37):
        held = DocumentSet.of(TokenizedCorpus.from_documents([("p", long[first : first + 200])], ByteTokenizer()))
        found = find_shared(training, held)
        assert found.held_out.tolist() == [0] and found.training.tolist() == [1]
    held = DocumentSet.of(TokenizedCorpus.from_documents([("p", text(8, 100))], ByteTokenizer()))
    assert not find_shared(training, held)
    parts = training.chosen(np.array([True, False]))
    held = DocumentSet.of(TokenizedCorpus.from_documents([("p", long[:200])], ByteTokenizer()))
    assert not find_shared(parts, held)


def test_what_was_found_is_remembered(tmp_path, monkeypatch):
    documents = DocumentSet.of(
        TokenizedCorpus.from_documents([("a", text(1, 60)), ("b", text(2, 60))], ByteTokenizer())
    )
    held = documents.chosen(np.array([False, True]))
    first = find_shared(documents, held, tmp_path / "memory")
    monkeypatch.setattr(shared_module, "_contained", None)
    again = find_shared(documents, held, tmp_path / "memory")
    assert again.held_out.tolist() == first.held_out.tolist() == [0] and again.training.tolist() == [1]
