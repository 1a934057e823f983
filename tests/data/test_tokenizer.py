"""Tokenizers: text comes back exactly, streams equal the whole, and what is saved loads as the same tokenizer."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, ByT5Tokenizer

from megalodon.data import ByteTokenizer, TokenizedCorpus, check_vocabulary, load_tokenizer
from megalodon.data.bpe import train_bpe, train_bpe_folder
from megalodon.data.cutting import cut_at_words
from megalodon.data.pretrained import PretrainedTokenizer

SAMPLE = "The cat sat on the mat, and the other cats sat on it's hat.\n\n    def cats(): return 'cat' + 12\r\n" * 40
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=80)
# What breaks word splitting: runs of white space of all sorts, contractions, digits, marks.
WORDS = st.text(st.sampled_from([*"ab'st1, .\n\r\t\u00a0\u2003\x1c\x85Ää€😀\u0301"]), max_size=120)


@pytest.fixture(scope="module")
def bpe() -> PretrainedTokenizer:
    return train_bpe([[SAMPLE]], 320)


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory) -> PretrainedTokenizer:
    """A tokenizer of the SentencePiece kind: a space in front, U+2581 for spaces, bytes for what it does not know."""
    words = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁abct", "▁c", "at", "▁cat"]
    merges = [("▁", "c"), ("a", "t"), ("▁c", "at")]
    vocabulary = {word: i for i, word in enumerate(words)}
    model = models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "</s>"])
    path = tmp_path_factory.mktemp("fallback") / "tokenizer.json"
    backend.save(str(path))
    return load_tokenizer(path)


@given(text=TEXTS)
def test_bytes_are_utf8(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64 and ids.tolist() == list(text.encode())
    assert np.array_equal(tokenizer.encode(text.encode()), ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.num_bytes(ids) == len(text.encode())


def test_the_end_of_a_document_is_no_text():
    tokenizer = ByteTokenizer()
    assert tokenizer.eos_token_id == 0
    assert tokenizer.decode([97, 0, 98]) == "ab"
    assert tokenizer.num_bytes([97, 0, 98]) == 2
    with pytest.raises(ValueError, match="byte 1 is NUL"):
        tokenizer.encode("a\0b")


@settings(max_examples=30)
@given(text=TEXTS)
def test_bytes_saved_for_transformers_give_the_same_ids(tmp_path_factory, text):
    theirs = saved_bytes(tmp_path_factory)
    ids = theirs(text)["input_ids"]
    assert ids == list(text.encode())
    assert theirs.decode(ids) == text


def saved_bytes(factory, cache={}):  # noqa: B006 - saved once for all examples
    if not cache:
        folder = factory.mktemp("bytes")
        ByteTokenizer().save(folder)
        cache["tokenizer"] = AutoTokenizer.from_pretrained(folder)
    return cache["tokenizer"]


def test_a_saved_byte_tokenizer_is_complete_and_loads_as_the_built_in_one(tmp_path):
    ByteTokenizer().save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (len(theirs), theirs.eos_token_id, theirs.pad_token_id) == (256, 0, 0)
    text = "".join(chr(i) for i in range(1, 0x500)) + "Ā 😀"
    assert theirs(text)["input_ids"] == list(text.encode())
    assert theirs.decode([65, 0], skip_special_tokens=True) == "A"
    ours = load_tokenizer(tmp_path)
    assert isinstance(ours, ByteTokenizer) and ours.fingerprint == load_tokenizer("bytes").fingerprint
    assert not list(tmp_path.glob(".*")), "nothing temporary is left"


@given(text=st.one_of(TEXTS, WORDS))
def test_bpe_gives_text_back_exactly(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert bpe.num_bytes(ids) == len(text.encode())
    assert bpe.decode([bpe.eos_token_id, *ids, bpe.eos_token_id]) == text


def test_bpe_takes_its_end_token_in_text_for_text(bpe):
    ids = bpe.encode("<|endoftext|>")
    assert bpe.eos_token_id not in ids and bpe.decode(ids) == "<|endoftext|>"


@pytest.mark.parametrize("text", ["a    b", "a\n\n\n\nb", "x \n    y\n", "\u2003    b"])
def test_bpe_is_never_cut_inside_white_space(bpe, text):
    assert bpe.encode("    b").tolist() != bpe.encode(" ").tolist() + bpe.encode("   b").tolist()
    for size in range(1, len(text)):
        cut = list(cut_at_words([text], characters=size))
        assert [i for part in cut for i in bpe.encode(part).tolist()] == bpe.encode(text).tolist()


@settings(max_examples=200)
@given(text=WORDS, size=st.integers(1, 12), data=st.data())
def test_bpe_cut_at_words_equals_the_whole(bpe, text, size, data):
    at = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[a:b] for a, b in zip([0, *at], [*at, len(text)], strict=True)]
    cut = list(cut_at_words(pieces, characters=size))
    assert "".join(cut) == text
    assert [i for part in cut for i in bpe.encode(part).tolist()] == bpe.encode(text).tolist()


@pytest.mark.parametrize("which", ["bytes", "bpe", "byte_fallback"])
def test_a_streamed_text_equals_the_whole(which, bpe, byte_fallback):
    tokenizer = {"bytes": ByteTokenizer(), "bpe": bpe, "byte_fallback": byte_fallback}[which]
    text = SAMPLE * 60  # several pieces
    pieces = [text[i : i + 1000] for i in range(0, len(text), 1000)]
    streamed = list(tokenizer.encode_stream(iter(pieces)))
    assert np.array_equal(np.concatenate(streamed), tokenizer.encode(text))
    assert list(tokenizer.encode_stream([])) == []


def test_a_long_stream_of_bpe_is_cut_so_that_memory_stays_small(bpe):
    consumed = 0

    def endless():
        nonlocal consumed
        while True:
            consumed += 1
            yield SAMPLE

    stream = bpe.encode_stream(endless())
    next(stream)
    assert consumed * len(SAMPLE) < 2_000_000


def test_bpe_training_is_reproducible_and_saves_for_transformers(tmp_path, bpe):
    again = train_bpe([[SAMPLE[:999], SAMPLE[999:]]], 320)
    assert again.fingerprint == bpe.fingerprint and bpe.vocab_size <= 320
    assert len(bpe.encode(SAMPLE)) < len(SAMPLE) / 2
    bpe.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(SAMPLE)["input_ids"] == bpe.encode(SAMPLE).tolist()
    assert theirs.eos_token == theirs.pad_token == "<|endoftext|>"
    loaded = load_tokenizer(tmp_path)
    assert loaded.fingerprint == bpe.fingerprint and loaded.eos_token_id == bpe.eos_token_id == 0
    bare = load_tokenizer(tmp_path / "tokenizer.json")
    assert bare.eos_token_id == 0 and np.array_equal(bare.encode(SAMPLE), bpe.encode(SAMPLE))


def test_bpe_training_refuses_what_cannot_work(tmp_path):
    with pytest.raises(ValueError, match="vocab_size is 100; it must be 257 or more"):
        train_bpe([["abc"]], 100)
    with pytest.raises(ValueError, match="no text to learn"):
        train_bpe([[""], []], 300)
    (tmp_path / "t.txt").write_text(SAMPLE)
    with pytest.raises(FileExistsError, match="exists already"):
        train_bpe_folder([[SAMPLE]], tmp_path, 300)


def test_a_sentencepiece_tokenizer_maps_tokens_to_bytes(byte_fallback):
    assert byte_fallback.eos_token_id == 1
    ids = byte_fallback.encode("cat caté")
    assert byte_fallback.decode(ids) == "cat caté"
    assert byte_fallback.num_bytes(ids) == len("cat caté".encode()) + 1  # the space it puts in front
    assert byte_fallback.num_bytes([1]) == 0


def test_a_tokenizer_written_in_python_works_and_says_what_it_cannot(tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("héllo </s>")
    assert tokenizer.eos_token_id not in ids and tokenizer.decode(ids) == "héllo </s>"
    assert tokenizer.token_bytes is None
    with pytest.raises(ValueError, match="cannot map tokens to bytes"):
        tokenizer.num_bytes(ids)


@settings(max_examples=60)
@given(text=st.text(st.sampled_from([*"cat é€😀\n"]), max_size=40), data=st.data())
@pytest.mark.parametrize("which", ["bytes", "bpe", "byte_fallback"])
def test_streamed_decoding_adds_up_and_gives_whole_characters(which, bpe, byte_fallback, text, data):
    tokenizer = {"bytes": ByteTokenizer(), "bpe": bpe, "byte_fallback": byte_fallback}[which]
    ids = tokenizer.encode(text)
    decoder = tokenizer.stream_decoder()
    out = [decoder.feed(int(i)) for i in ids]
    assert not any("\ufffd" in part for part in out)
    assert "".join(out) + decoder.flush() == tokenizer.decode(ids)
    part = tokenizer.encode(text[: data.draw(st.integers(0, len(text)))])
    assert decoder.feed(part) + decoder.flush() == tokenizer.decode(part)


def test_an_incomplete_character_is_replaced_at_the_end():
    decoder = ByteTokenizer().stream_decoder()
    assert decoder.feed(list("€".encode()[:2])) == ""
    assert decoder.flush() == "\ufffd"
    assert decoder.feed(list(b"ok")) == "ok"


def test_ids_out_of_range_are_refused(bpe):
    with pytest.raises(ValueError, match=r"0 to 256 given, tokenizer 'bytes' has 0 to 255"):
        ByteTokenizer().decode([0, 256])
    with pytest.raises(ValueError, match="out of range"):
        bpe.stream_decoder().feed(-1)


def test_the_vocabulary_must_fit_the_model(bpe):
    check_vocabulary(ByteTokenizer(), 256)
    with pytest.raises(ValueError, match=r"tokenizer 'bytes' has ids up to 255, the model's vocab_size is 255"):
        check_vocabulary(ByteTokenizer(), 255)
    corpus = TokenizedCorpus.from_documents([("a", "zebra")], ByteTokenizer())
    check_vocabulary(corpus, ord("z") + 1)
    with pytest.raises(ValueError, match=f"ids up to {ord('z')}.*set vocab_size to {ord('z') + 1}"):
        check_vocabulary(corpus, ord("z"))


def test_what_is_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file or folder.*Give `bytes`"):
        load_tokenizer(str(tmp_path / "none.json"))
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer\.json nor tokenizer_config\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"not a tokenizer\.json"):
        load_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def test_saved_truncation_never_shortens_a_document(tmp_path, bpe):
    bpe.save(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert np.array_equal(load_tokenizer(tmp_path).encode(SAMPLE), bpe.encode(SAMPLE))


def test_an_unknown_word_splitter_keeps_the_text_whole(tmp_path, bpe):
    bpe.save(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.save(str(tmp_path / "other.json"))
    tokenizer = load_tokenizer(tmp_path / "other.json")
    assert list(tokenizer.cut(["a b ", "c d"])) == ["a b c d"]
    assert tokenizer.fingerprint != bpe.fingerprint
