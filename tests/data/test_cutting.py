"""Texts of any length in bounded memory: for every kind of tokenizer the parts, encoded one by one, are the whole, and
the bytes that tokens stand for are those of the text."""

from __future__ import annotations

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from megalodon.data import ByteTokenizer
from megalodon.data.cutting import Cutter, cut_at_words
from megalodon.data.pretrained import PretrainedTokenizer, sizes_by_offsets

SAMPLE = [
    "The cat sat on the mat, and 1234567 other cats sat on it's hat.\n\n    def cats(): return 'cat' + 12\r\n" * 20,
    "世界你好\uff0c世界。\n東京は日本の首都です。" * 20,
    "Ångström café naïve cafe\u0301 -- ''quoted'' ... !!!\n\n\t\tif (x) {\n  y = 123;  }\n" * 20,
    "    a\n        b\n  c   d\n" * 20,
]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
ALPHABET = [*"abcat .,'1234\n\r\t", "é", "e\u0301", "世", "\uff0c", "😀", "  ", "\n\n", "cat", "\u00a0", "▁", "ﬁ"]
TEXT = st.lists(st.sampled_from(ALPHABET), max_size=80).map("".join)


def trained(model, trainer, pre=None, normalizer=None, decoder=None, post=None) -> PretrainedTokenizer:
    backend = tokenizers.Tokenizer(model)
    if pre is not None:
        backend.pre_tokenizer = pre
    if normalizer is not None:
        backend.normalizer = normalizer
    if decoder is not None:
        backend.decoder = decoder
    if post is not None:
        backend.post_processor = post
    backend.train_from_iterator(SAMPLE, trainer)
    return PretrainedTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"), "trained")


def bpe(size=420, alphabet=True, **options):
    initial = pre_tokenizers.ByteLevel.alphabet() if alphabet else []
    return trainers.BpeTrainer(
        vocab_size=size, special_tokens=["</s>"], initial_alphabet=initial, show_progress=False, **options
    )


def byte_level(pre, **more) -> PretrainedTokenizer:
    return trained(models.BPE(), bpe(), pre=pre, decoder=decoders.ByteLevel(), **more)


def split(pattern: str, behavior="isolated"):
    return pre_tokenizers.Split(Regex(pattern), behavior)


def sentencepiece(mark: bool, metaspace: bool) -> PretrainedTokenizer:
    """BPE with byte fallback, with a token for a space or without one, the space in front put by either way."""
    words = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"abct.,\n1234", *("▁" * mark)]
    merges = [("a", "t"), ("c", "at"), ("a", "b")] + [("▁", "cat"), ("▁", "▁")] * mark
    words += [a + b for a, b in merges]
    vocabulary = {word: i for i, word in enumerate(words)}
    model = models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    backend = tokenizers.Tokenizer(model)
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "</s>"])
    return PretrainedTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"), "pieces")


def unigram(pre, normalizer=None) -> PretrainedTokenizer:
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    return trained(models.Unigram(), trainer, pre=pre, normalizer=normalizer, decoder=decoders.Metaspace())


def wordpiece() -> PretrainedTokenizer:
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "</s>"], show_progress=False)
    model = models.WordPiece(unk_token="[UNK]")
    return trained(model, trainer, pre=pre_tokenizers.BertPreTokenizer(), normalizer=normalizers.BertNormalizer())


MAKERS = {
    "bytes": ByteTokenizer,
    "gpt2": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "gpt2, trimmed offsets": lambda: byte_level(
        pre_tokenizers.ByteLevel(add_prefix_space=False), post=processors.ByteLevel(trim_offsets=True)
    ),
    "roberta, a space in front": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "llama 3": lambda: byte_level(
        pre_tokenizers.Sequence([split(LLAMA3), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    ),
    "qwen, NFC": lambda: byte_level(
        pre_tokenizers.Sequence([split(LLAMA3), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]),
        normalizer=normalizers.NFC(),
    ),
    "digits and punctuation": lambda: byte_level(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.Punctuation(),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    ),
    "spaces end words": lambda: byte_level(
        pre_tokenizers.Sequence([split(r"\S+\s?|\s+"), pre_tokenizers.ByteLevel(False, use_regex=False)])
    ),
    "words across spaces": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
    "llama 2": lambda: sentencepiece(mark=True, metaspace=False),
    "llama 2, Metaspace": lambda: sentencepiece(mark=True, metaspace=True),
    "no token for a space": lambda: sentencepiece(mark=False, metaspace=False),
    "no token for a space, Metaspace": lambda: sentencepiece(mark=False, metaspace=True),
    "unigram": lambda: unigram(pre_tokenizers.Metaspace(prepend_scheme="always")),
    "t5": lambda: unigram(
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]), normalizers.NFKC()
    ),
    "wordpiece": wordpiece,
    "python": lambda: PretrainedTokenizer(ByT5Tokenizer(), "byt5"),
}
KNOWS_NO_BYTES = ("python",)


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request):
    made = MAKERS[request.param]()
    made.kind = request.param
    return made


def cut(tokenizer, pieces, characters, context=24):
    if isinstance(tokenizer, ByteTokenizer):
        return list(tokenizer.cut(pieces))
    return list(Cutter(tokenizer._encode, tokenizer._ends, characters, context).cut(pieces))


@settings(max_examples=40)
@given(text=TEXT, repeat=st.integers(1, 4), size=st.integers(1, 40))
@example(text="1234567 ", repeat=40, size=10)
@example(text="12345678901234567890" * 10, repeat=1, size=10)
@example(text="世界你好" * 40, repeat=1, size=10)
@example(text="catcatabcat" * 40, repeat=1, size=10)
@example(text="a" * 300, repeat=1, size=10)
@example(text="\n   \n\t\n" * 40, repeat=1, size=10)
@example(text="e\u0301" * 150, repeat=1, size=10)
def test_parts_encoded_one_by_one_are_the_whole(tokenizer, text, repeat, size):
    text = text * repeat
    pieces = [text[i : i + 7] for i in range(0, len(text), 7)]
    parts = cut(tokenizer, pieces, size)
    assert "".join(parts) == text
    encoded = tokenizer.encode_pieces(parts, [i > 0 for i in range(len(parts))])
    ids = np.concatenate([np.zeros(0, np.int64), *(part.ids for part in encoded)])
    assert ids.tolist() == tokenizer.encode(text).tolist()


def test_every_tokenizer_cuts_ordinary_text(tokenizer):
    if tokenizer.kind == "bytes":
        return  # they are cut by number
    for text in (SAMPLE[0] * 3, SAMPLE[2] * 3, "the cat sat " * 300):
        parts = cut(tokenizer, [text], 400, 64)
        assert max(map(len, parts)) < 2000, tokenizer.kind


@pytest.mark.parametrize("text", ["ACGT" * 1000 + "GATTACA" * 300, "世界你好\uff0c" * 1000, "12345678" * 700])
def test_text_without_spaces_is_cut_too(tokenizer, text):
    if tokenizer.kind in ("bytes", "wordpiece"):
        return  # bytes are cut by number; for the other such a word is one unknown token
    assert max(map(len, cut(tokenizer, [text], 400, 64))) < 4000, tokenizer.kind


@settings(max_examples=60)
@given(text=TEXT)
def test_the_bytes_of_tokens_are_those_of_the_text(tokenizer, text):
    encoded = tokenizer.encode_pieces([text], [False])[0]
    if tokenizer.kind in KNOWS_NO_BYTES:
        assert encoded.sizes is None
        return
    assert len(encoded.sizes) == len(encoded.ids) and (encoded.sizes >= 0).all()
    if len(encoded.ids):
        assert encoded.sizes.sum() == len(text.encode())
    if tokenizer.sizes_by_id:
        assert encoded.sizes.tolist() == tokenizer.token_lengths[encoded.ids].tolist()


def test_a_space_in_front_counts_nothing_and_one_in_three_bytes_counts_one():
    tokenizer = sentencepiece(mark=False, metaspace=False)
    encoded = tokenizer.encode_pieces(["cat é"], [False])[0]
    spelled = [tokenizer.token_bytes[i] for i in encoded.ids]
    assert spelled == [b"\xe2", b"\x96", b"\x81", b"cat", b"\xe2", b"\x96", b"\x81", b"\xc3", b"\xa9"]
    assert encoded.sizes.tolist() == [0, 0, 0, 3, 0, 0, 1, 1, 1]
    assert tokenizer.encode_pieces([" cat"], [True])[0].sizes.tolist() == [0, 0, 1, 3]
    marked = sentencepiece(mark=True, metaspace=False)
    assert marked.encode_pieces(["cat cat"], [False])[0].sizes.tolist() == [3, 4]


def test_sizes_by_offsets():
    assert sizes_by_offsets("aé😀 b ", [(0, 1), (1, 2), (1, 2), (2, 3), (4, 5)]).tolist() == [1, 2, 0, 4, 3]
    assert sizes_by_offsets("", []).tolist() == []


def test_a_stream_asks_for_no_more_than_it_needs(tokenizer):
    if tokenizer.kind in KNOWS_NO_BYTES:
        return
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield SAMPLE[0]

    stream = tokenizer.encode_stream(endless())
    next(stream)
    assert read * len(SAMPLE[0]) < 100_000


def test_learning_holds_no_endless_run():
    pieces = list(cut_at_words(["x" * 50] * 10, characters=10, longest=100))
    assert max(map(len, pieces)) <= 100 and "".join(pieces) == "x" * 500
