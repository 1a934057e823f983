"""The token cache: made once, exact, found again, rebuilt when damaged, safe beside other builders."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megalodon.data import (
    ByteTokenizer,
    Corpus,
    DocumentSet,
    TokenizedCorpus,
    cache_root,
    content,
    open_tokenized,
    tokenize,
)
from megalodon.data import cache as cache_module
from megalodon.data.bpe import train_bpe
from megalodon.data.pretrained import PretrainedTokenizer
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


def stands_as_before(path: Path, content: str, status: os.stat_result) -> None:
    """Replace a file by another of its size and time."""
    other = path.with_suffix(".new")
    other.write_text(content)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(path)


def test_the_cache_follows_content_and_not_time(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(content, "SETTLED", -1e6)  # as if the files had long been there
    config, cache = {"source": str(folder)}, tmp_path / "cache"
    first = tokenize(config, ByteTokenizer(), cache)
    os.utime(folder / "a.txt", (1, 1))
    assert tokenize(config, ByteTokenizer(), cache).folder == first.folder
    stands_as_before(folder / "a.txt", "FIRST document\n", (folder / "a.txt").stat())
    changed = tokenize(config, ByteTokenizer(), cache)
    assert changed.folder != first.folder and changed.fingerprint != first.fingerprint
    assert ByteTokenizer().decode(changed.document(0)) == "FIRST document\n"
    stands_as_before(folder / "a.txt", TEXTS["a.txt"], (folder / "a.txt").stat())
    assert tokenize(config, ByteTokenizer(), cache).folder == first.folder


def test_the_fingerprint_is_that_of_the_documents_wherever_they_come_from(folder, tmp_path):
    first = tokenize({"source": str(folder)}, ByteTokenizer(), tmp_path / "cache")
    copy = tmp_path / "copy"
    copy.mkdir()
    rows = [{"text": text} for text in TEXTS.values()]
    (copy / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "gz").mkdir()
    for name, text in TEXTS.items():
        (tmp_path / "gz" / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    for place in (copy, tmp_path / "gz"):
        other = tokenize({"source": str(place)}, ByteTokenizer(), tmp_path / "cache")
        assert other.fingerprint == first.fingerprint and other.folder != first.folder
        assert other.names[0].startswith(str(place)), "names are those of its own files"
    assert DocumentSet.of(first).fingerprint() == DocumentSet.of(other).fingerprint()
    one = TokenizedCorpus.from_documents(list(TEXTS.items()), ByteTokenizer())
    assert one.document_hashes[[0, 2, 3]].tolist() == first.document_hashes.tolist()


@pytest.mark.parametrize("kind", ["huggingface", "auto"])
def test_folders_of_the_same_relative_name_are_different_corpora(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for number in range(2):
        project = tmp_path / f"project{number}"
        (project / "data").mkdir(parents=True)
        (project / "data" / "rows.jsonl").write_text(json.dumps({"text": f"text of project {number}"}) + "\n")
        os.utime(project / "data" / "rows.jsonl", (1, 1))
    for number in range(2):
        monkeypatch.chdir(tmp_path / f"project{number}")
        corpus = tokenize({"source": "data", "kind": kind}, ByteTokenizer(), tmp_path / "cache")
        assert ByteTokenizer().decode(corpus.document(0)) == f"text of project {number}"
    status = Path("data/rows.jsonl").stat()
    stands_as_before(Path("data/rows.jsonl"), json.dumps({"text": "other text, as long"}) + "\n", status)
    corpus = tokenize({"source": "data", "kind": kind}, ByteTokenizer(), tmp_path / "cache")
    assert ByteTokenizer().decode(corpus.document(0)) == "other text, as long"


def test_files_for_a_builder_are_those_of_its_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "data").mkdir()
    for name in ("a", "b"):
        (tmp_path / "data" / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    config = {"source": str(tmp_path / "data"), "kind": "huggingface", "data_files": "a.jsonl"}
    assert [document.text for document in Corpus(config).documents()] == ["a"]
    before = Corpus(config).fingerprint()
    (tmp_path / "data" / "b.jsonl").write_text("{}")
    assert Corpus(config).fingerprint() == before
    (tmp_path / "data" / "a.jsonl").write_text(json.dumps({"text": "c"}) + "\n")
    assert Corpus(config).fingerprint() != before


def test_a_dataset_on_the_hub_is_known_by_its_commit(tmp_path, monkeypatch):
    commits = iter(["1" * 40, "2" * 40, None])

    class Api:
        def dataset_info(self, source, revision, timeout):
            if (commit := next(commits)) is None:
                raise OSError("no connection")
            return SimpleNamespace(sha=commit)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    seen = []
    for _ in range(3):
        corpus = Corpus({"source": "someone/texts", "kind": "huggingface"})
        seen.append(corpus.fingerprint(tmp_path))
        assert corpus._hub_rows().options["revision"] in ("1" * 40, "2" * 40)
    assert seen[0] != seen[1] == seen[2], "without a connection, the commit of the last time"


def test_a_file_that_changes_while_it_is_read_is_refused(folder, tmp_path):
    class Writing(ByteTokenizer):
        def encode_pieces(self, texts, continues):
            (folder / "a.txt").write_text("written meanwhile")
            return super().encode_pieces(texts, continues)

    with pytest.raises(ValueError, match="was changed while it was read"):
        tokenize({"source": str(folder)}, Writing(), tmp_path / "cache")


def test_bytes_of_tokens_are_kept_where_ids_do_not_tell(tmp_path):
    (tmp_path / "a.txt").write_text("cat " * 50 + "é")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=270, special_tokens=["</s>"], initial_alphabet=alphabet)
    backend.train_from_iterator(["cat cat"], trainer)
    tokenizer = PretrainedTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"), "front")
    for _ in range(2):
        corpus = tokenize({"source": str(tmp_path / "a.txt")}, tokenizer, tmp_path / "cache")
        assert corpus.sizes.sum() == corpus.document_bytes.sum() == 202
        assert corpus.text_sizes(slice(None)).tolist() == corpus.sizes.tolist() and corpus.sizes[-1] == 0
        assert corpus.token_lengths[corpus.tokens].sum() == 203, "the space in front is not in the text"
    (corpus.folder / "sizes.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"sizes\.bin is truncated"):
        open_tokenized(corpus.folder)
