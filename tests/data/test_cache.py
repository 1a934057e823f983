"""The token cache: made once, exact, found again, rebuilt when damaged, safe beside other builders."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from megalodon.data import ByteTokenizer, Corpus, DocumentSet, TokenizedCorpus, cache_root, open_tokenized, tokenize
from megalodon.data import cache as cache_module
from megalodon.data.bpe import train_bpe
from megalodon.data.tokenized import DocumentNames, id_dtype

TEXTS = {"a.txt": "first document\n", "b.txt": "", "c.txt": "zweites Dokument: äöü €\n" * 50, "d.txt": "x"}


@pytest.fixture
def folder(tmp_path) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    for name, text in TEXTS.items():
        (source / name).write_text(text)
    return source


def test_documents_come_back_exactly_with_their_borders(folder, tmp_path):
    tokenizer = ByteTokenizer()
    corpus = tokenize({"source": str(folder)}, tokenizer, tmp_path / "cache")
    expected = {str(folder / name): text for name, text in TEXTS.items() if text}
    assert list(corpus.names) == list(expected)
    assert corpus.tokens.dtype == np.uint8 and not corpus.tokens.flags.writeable
    assert corpus.document_bytes.tolist() == [len(text.encode()) for text in expected.values()]
    for i, text in enumerate(expected.values()):
        ids = corpus.document(i)
        assert tokenizer.decode(ids) == text
        assert ids[-1] == tokenizer.eos_token_id and 0 not in ids[:-1]
    assert corpus.num_tokens == corpus.offsets[-1] == corpus.document_bytes.sum() + corpus.num_documents
    assert corpus.max_token_id == max(corpus.tokens)


def test_bpe_documents_of_any_length_equal_their_encoding(folder, tmp_path, monkeypatch):
    long = "several groups of text, cut at words. " * 500
    (folder / "e.txt").write_text(long)
    tokenizer = train_bpe([[long]], 300)
    monkeypatch.setattr(cache_module, "GROUP_CHARACTERS", 100)
    monkeypatch.setattr("megalodon.data.pretrained.CUT_CHARACTERS", 300)
    corpus = tokenize({"source": str(folder)}, tokenizer, tmp_path / "cache")
    assert corpus.tokens.dtype == np.uint16
    assert np.array_equal(corpus.document(3), [*tokenizer.encode(long), tokenizer.eos_token_id])
    assert corpus.num_documents == 4 and DocumentSet.of(corpus).num_bytes == corpus.document_bytes.sum()
    assert corpus.token_lengths[corpus.tokens].sum() == corpus.document_bytes.sum()


def test_a_second_run_reads_the_cache_and_a_changed_file_makes_another(folder, tmp_path):
    config, calls = {"source": str(folder)}, []
    first = tokenize(config, ByteTokenizer(), tmp_path / "cache", calls.append)
    assert calls[-1].tokens == first.num_tokens and calls[-1].documents == first.num_documents
    assert calls[-1].bytes == calls[-1].total_bytes == sum(len(text.encode()) for text in TEXTS.values())
    calls.clear()
    again = tokenize(config, ByteTokenizer(), tmp_path / "cache", calls.append)
    assert not calls and again.folder == first.folder and np.array_equal(again.tokens, first.tokens)
    (folder / "a.txt").write_text("changed")
    changed = tokenize(config, ByteTokenizer(), tmp_path / "cache", calls.append)
    assert calls and changed.folder != first.folder
    other = tokenize(config, train_bpe([["abc " * 9]], 260), tmp_path / "cache")
    assert other.folder not in (first.folder, changed.folder)


@pytest.mark.parametrize(
    ("name", "damage"),
    [(n, d) for n in ("index.safetensors", "meta.json") for d in ("truncate", "remove", "flip")]
    + [("tokens.bin", "truncate"), ("tokens.bin", "remove")],
)
def test_a_damaged_cache_is_refused_and_built_again(folder, tmp_path, caplog, name, damage):
    config = {"source": str(folder)}
    first = tokenize(config, ByteTokenizer(), tmp_path / "cache")
    expected, path = first.tokens.tolist(), first.folder / name
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(content[:-1] if name != "meta.json" else content[:-9])
    else:
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])  # in the values, not in the header
        if name == "meta.json":
            path.write_bytes(content.replace(b'"num_tokens"', b'"num_tokins"'))
    with pytest.raises(ValueError, match=r"is damaged.*delete it to have it built again"):
        open_tokenized(first.folder)
    assert tokenize(config, ByteTokenizer(), tmp_path / "cache").tokens.tolist() == expected
    assert "built again" in caplog.text or "building it again" in caplog.text
    assert open_tokenized(first.folder).tokens.tolist() == expected


def test_a_failed_build_leaves_nothing(folder, tmp_path):
    (folder / "z.txt").write_bytes(b"ab\0cd")
    with pytest.raises(ValueError, match=r"z\.txt: byte 2 is NUL"):
        tokenize({"source": str(folder)}, ByteTokenizer(), tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir()]


def test_an_empty_corpus_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"empty\.txt' has no text"):
        tokenize({"source": str(tmp_path / "empty.txt")}, ByteTokenizer(), tmp_path / "cache")
    with pytest.raises(ValueError, match="no text"):
        TokenizedCorpus.from_documents([], ByteTokenizer())


def test_a_full_disk_is_named(folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module, "save_file", full)
    with pytest.raises(OSError, match=r"disk full while writing the token cache.*MEGALODON_CACHE"):
        tokenize({"source": str(folder)}, ByteTokenizer(), tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir()]


def test_what_a_killed_builder_left_does_not_disturb(folder, tmp_path):
    corpus = tokenize({"source": str(folder)}, ByteTokenizer(), tmp_path / "cache")
    partial = corpus.folder.with_suffix(".partial")
    os.rename(corpus.folder, partial)  # noqa: PTH104 - as if killed before the last rename
    (partial / "tokens.bin").write_bytes(b"half")
    again = tokenize({"source": str(folder)}, ByteTokenizer(), tmp_path / "cache")
    assert again.num_documents == 3 and not partial.exists()


def _build_slowly(source: str, cache: str, log: str) -> None:
    def progress(_):
        with Path(log).open("a") as stream:
            stream.write("built\n")

    assert tokenize({"source": source}, ByteTokenizer(), cache, progress).num_documents == 3


def test_builders_at_the_same_time_build_once(folder, tmp_path):
    context = multiprocessing.get_context("fork")
    arguments = (str(folder), str(tmp_path / "cache"), str(tmp_path / "log"))
    workers = [context.Process(target=_build_slowly, args=arguments) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert (tmp_path / "log").read_text() == "built\n"


def test_the_cache_lives_where_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGALODON_CACHE", str(tmp_path / "env"))
    assert cache_root(tmp_path / "given") == tmp_path / "given"
    assert cache_root() == tmp_path / "env"
    monkeypatch.delenv("MEGALODON_CACHE")
    assert cache_root() == Path.home() / ".cache" / "megalodon"


def test_meta_tells_what_the_cache_was_made_from(folder, tmp_path):
    corpus = tokenize(Corpus({"source": str(folder)}), ByteTokenizer(), tmp_path / "cache")
    meta = json.loads((corpus.folder / "meta.json").read_text())
    assert meta["corpus"] == {"source": str(folder)} and meta["tokenizer_name"] == "bytes"
    assert meta["num_bytes"] == corpus.document_bytes.sum()


@pytest.mark.parametrize(("size", "dtype"), [(2, "u1"), (256, "u1"), (257, "u2"), (65536, "u2"), (65537, "u4")])
def test_ids_are_as_small_as_fits(size, dtype):
    assert id_dtype(size).str.endswith(dtype)


def test_names_of_documents():
    names = ["a", "", "ü/é.txt", "last"]
    kept = DocumentNames.of(names)
    assert list(kept) == names and kept[-1] == "last" and kept[1:3] == names[1:3] and len(kept) == 4
    with pytest.raises(IndexError):
        kept[4]
