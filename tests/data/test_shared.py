"""What is held out is not trained on: by path, by content, inside longer texts; and what is apart is let be."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import random
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from megalodon.data import (
    ByteTokenizer,
    CorpusConfig,
    DocumentSet,
    HeldOutConfig,
    TokenizedCorpus,
    Tokenizer,
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
    tokenizer = tokenizer_of(which)
    place = held_out_ways(corpus, tmp_path)[way]
    with pytest.raises(ValueError, match=r"held_out\.corpus: .*part of the training corpus.*set held_out\.shared") as e:
        prepare(corpus, place, tmp_path, tokenizer=tokenizer)
    assert "2.txt" in str(e.value) and "\n" not in str(e.value)
    told: list[str] = []
    training, held = prepare(corpus, place, tmp_path, "remove", tokenizer, told)
    assert sorted(Path(training.name(i)).name for i in range(len(training))) == ["0.txt", "1.txt", "3.txt"]
    assert len(held) and any("1 documents with" in line and "not trained on" in line for line in told)


LINES = "".join(text(500 + i, 5) for i in range(60))


def rewritten(content: str) -> dict[str, bytes]:
    """A text as other machines and editors would write it."""
    return {
        "as it is": content.encode(),
        "CRLF": content.replace("\n", "\r\n").encode(),
        "CR": content.replace("\n", "\r").encode(),
        "no newline at the end": content.rstrip("\n").encode(),
        "more newlines at the end": f"{content}\n\n\n".encode(),
        "byte order mark": content.encode("utf-8-sig"),
        "byte order mark and CRLF": content.replace("\n", "\r\n").encode("utf-8-sig"),
        "two byte order marks": b"\xef\xbb\xbf" + content.encode("utf-8-sig"),
        "spaces at ends of lines": content.replace("\n", "  \t\n").encode(),
        "spaces that do not break": content.replace(" ", "\xa0").encode(),
        "other lines": content.replace("\n", " ").encode(),
        "blank lines": content.replace("\n", "\n\n").encode(),
    }


def formats(content: bytes) -> dict[str, bytes]:
    """Files that hold a text, by the ends of their names."""
    row = content.decode()
    table = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["", row]}), table)
    quoted = row.replace('"', '""')
    return {
        ".txt": content,
        ".txt.gz": gzip.compress(content),
        ".txt.xz": lzma.compress(content),
        ".jsonl": json.dumps({"text": row}).encode(),
        ".json": json.dumps([{"text": row}], indent=2).encode(),
        ".csv": f'text\n"{quoted}"\n'.encode(),
        ".parquet": table.getvalue(),
    }


@cache
def tokenizer_of(which: str) -> Tokenizer:
    return ByteTokenizer() if which == "bytes" else train_bpe([[text(50, 500)]], 280)


def refused_both_ways(corpus: Path, copy: Path, tmp_path: Path, which: str) -> None:
    for trained, held in ((corpus, copy), (copy, corpus)):
        with pytest.raises(ValueError, match=r"part of the training corpus by content, such as .*, which is in") as e:
            prepare(trained, held, tmp_path, tokenizer=tokenizer_of(which))
        assert "2.txt" in str(e.value) and copy.name in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("which", ["bytes", "bpe"])
@pytest.mark.parametrize("content", [LINES, text(3, 16)], ids=["long", "short"])
@pytest.mark.parametrize("way", rewritten(""))
def test_a_copy_is_a_copy_however_it_is_written(corpus, tmp_path, way, content, which) -> None:
    (corpus / "2.txt").write_text(content)
    (tmp_path / "copy.txt").write_bytes(rewritten(content)[way])
    refused_both_ways(corpus, tmp_path / "copy.txt", tmp_path, which)


@pytest.mark.parametrize("ending", formats(b""))
def test_a_copy_is_a_copy_in_any_format(corpus, tmp_path, ending: str) -> None:
    (corpus / "2.txt").write_text(LINES)
    copy = tmp_path / f"copy{ending}"
    copy.write_bytes(formats(rewritten(LINES)["byte order mark and CRLF"])[ending])
    refused_both_ways(corpus, copy, tmp_path, "bytes")


def row(number: int, words: int) -> str:
    return f"{number * 7919 % 100003} {text(number, words)}"


@pytest.mark.parametrize("which", ["bytes", "bpe"])
@pytest.mark.parametrize("words", [2, 12, 60], ids=["short rows", "lines", "paragraphs"])
def test_the_same_rows_in_another_form(tmp_path: Path, which: str, words: int) -> None:
    tokenizer = tokenizer_of(which)
    rows = [row(1000 + i, words) for i in range(40)]
    others = [row(2000 + i, words) for i in range(40)]
    lines = lambda rows: "".join(json.dumps({"text": row}) + "\n" for row in rows)  # noqa: E731
    (tmp_path / "train.jsonl").write_text(lines(others + rows))
    (tmp_path / "apart.jsonl").write_text(lines(row(3000 + i, words + 3) for i in range(40)))
    held = {"same.jsonl": lines(rows), "turned.jsonl": lines(rows[::-1])}
    held |= {"stripped.jsonl": lines(each.strip() for each in rows)}
    held |= {"as one.txt": "".join(rows), "as one.crlf.txt": "".join(rows).replace("\n", "\r\n")}
    for name, content in held.items():
        (tmp_path / name).write_bytes(content.encode())
        with pytest.raises(ValueError, match="part of the training corpus by content"):
            prepare(tmp_path / "train.jsonl", tmp_path / name, tmp_path, tokenizer=tokenizer)
        training, _ = prepare(tmp_path / "train.jsonl", tmp_path / name, tmp_path, "remove", tokenizer)
        left = {training.name(i).rpartition(":")[2] for i in range(len(training))}
        expected = {str(i + 1) for i in range(40)}
        assert left == expected or (words == 2 and name.startswith("as one") and expected <= left)
        if words > 2:  # half of the held-out text is no more than half of it, where rows are that short
            with pytest.raises(ValueError, match="part of the training corpus by content"):
                prepare(tmp_path / name, tmp_path / "train.jsonl", tmp_path, tokenizer=tokenizer)
    training, _ = prepare(tmp_path / "train.jsonl", tmp_path / "apart.jsonl", tmp_path, tokenizer=tokenizer)
    assert len(training) == 80


def test_a_sentence_of_a_book_and_sentences_that_are_not(tmp_path: Path) -> None:
    sentences = [text(70 + i, 9).strip() for i in range(30)]
    (tmp_path / "book.txt").write_text(" ".join(sentences))
    for name, content in (("held.txt", sentences[17]), ("apart.txt", text(999, 9))):
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=r"such as .*held\.txt, which is in .*book\.txt"):
        prepare(tmp_path / "book.txt", tmp_path / "held.txt", tmp_path)
    prepare(tmp_path / "book.txt", tmp_path / "apart.txt", tmp_path)


def test_copies_that_differ_in_line_ends_are_drawn_together() -> None:
    texts = [("a", LINES), ("b", text(2, 50)), ("again", LINES.replace("\n", "\r\n")), ("c", text(3, 50))]
    corpus = TokenizedCorpus.from_documents(texts, ByteTokenizer())
    for seed in range(8):
        sets = split_documents(corpus, documents=1, seed=seed)
        names = [{documents.name(i) for i in range(len(documents))} for documents in sets]
        assert any({"a", "again"} <= side for side in names)


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
        found = find_shared(training, held, ByteTokenizer())
        assert found.held_out.tolist() == [0] and found.training.tolist() == [1]
    held = DocumentSet.of(TokenizedCorpus.from_documents([("p", text(8, 100))], ByteTokenizer()))
    assert not find_shared(training, held, ByteTokenizer())
    parts = training.chosen(np.array([True, False]))
    held = DocumentSet.of(TokenizedCorpus.from_documents([("p", long[:200])], ByteTokenizer()))
    assert not find_shared(parts, held, ByteTokenizer())


def test_what_was_found_is_remembered(tmp_path, monkeypatch):
    documents = DocumentSet.of(
        TokenizedCorpus.from_documents([("a", text(1, 60)), ("b", text(2, 60))], ByteTokenizer())
    )
    held = documents.chosen(np.array([False, True]))
    first = find_shared(documents, held, ByteTokenizer(), tmp_path / "memory")
    monkeypatch.setattr(shared_module, "_contained", None)
    again = find_shared(documents, held, ByteTokenizer(), tmp_path / "memory")
    assert again.held_out.tolist() == first.held_out.tolist() == [0] and again.training.tolist() == [1]
