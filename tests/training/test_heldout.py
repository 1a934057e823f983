"""The held-out loss: that of `evaluate perplexity` on the same texts, whatever the batches they are read in."""

from __future__ import annotations

import math

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from megalodon import MegalodonConfig, MegalodonForCausalLM
from megalodon.data import ByteTokenizer, Document, DocumentSet, TokenizedCorpus, held_out_batches
from megalodon.data.bpe import train_bpe
from megalodon.data.pretrained import PretrainedTokenizer
from megalodon.evaluation import evaluate_perplexity
from megalodon.training.heldout import HeldOutLoss, combined, measure_heldout

CPU = torch.device("cpu")
TEXTS = [
    ("a", "the whale swam " * 9),
    ("b", "é" * 40),
    ("c", "stone and water " * 5),
    ("d", "x"),
    ("e", "of the sea " * 30),
]


@pytest.fixture
def model():
    sizes = {"num_layers": 1, "model_dim": 32, "z_dim": 16, "value_dim": 32, "ffn_hidden_dim": 48, "cema_ndim": 4}
    return MegalodonForCausalLM(MegalodonConfig(vocab_size=300, norm_num_groups=4, chunk_size=16, dropout=0.5, **sizes))


def without_a_mark() -> PretrainedTokenizer:
    """Of the SentencePiece kind, without a token for a space: each takes three byte tokens, the one in front too."""
    words = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"whalestond"]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<unk>", "</s>"])
    return PretrainedTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"), "no mark")


TOKENIZERS = {
    "bytes": ByteTokenizer,
    "bpe": lambda: train_bpe([[text] for _, text in TEXTS], 290),
    "no mark": without_a_mark,
}


def batches(batch_size, sequence_length, tokenizer=None, max_tokens=None):
    documents = DocumentSet.of(TokenizedCorpus.from_documents(TEXTS, tokenizer or ByteTokenizer()))
    return held_out_batches(documents, batch_size=batch_size, sequence_length=sequence_length, max_tokens=max_tokens)


def measure(model, batches, **arguments):
    return measure_heldout(model, batches, device=CPU, precision="float32", **arguments)


@pytest.mark.parametrize("which", TOKENIZERS)
def test_says_what_the_evaluation_says_whatever_the_batch(model, which):
    tokenizer = TOKENIZERS[which]()
    model.eval()
    report = evaluate_perplexity(model, tokenizer, [Document(name, [text]) for name, text in TEXTS])["overall"]
    for batch_size, sequence_length in ((1, 19), (3, 16), (8, 7), (16, 500)):
        measured = measure(model, batches(batch_size, sequence_length, tokenizer))
        assert measured.num_targets == report["tokens"]
        assert measured.loss == pytest.approx(report["loss"], rel=1e-5)
        assert measured.bits_per_byte == pytest.approx(report["bits_per_byte"], rel=1e-5)


def test_bits_are_those_of_the_text_and_of_nothing_else(model):
    """Against a forward pass over each document's ids: no end is scored, a space is one byte, none stands in front."""
    model.eval()
    tokenizer = without_a_mark()
    nats = size = 0
    with torch.no_grad():
        for _, text in TEXTS:
            ids = torch.tensor([tokenizer.encode(text).tolist()])
            nats += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            size += len(text.encode())  # the first token, which is not scored, is a third of the space in front
    measured = measure(model, batches(2, 32, tokenizer))
    assert measured.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert "bits per byte" in str(measured)


def test_the_first_tokens_only_and_the_same_ones_for_every_batch(model):
    losses = {measure(model, batches(size, 16, max_tokens=200)).num_targets for size in (1, 2, 5)}
    assert losses == {200 - 2}  # of the first two documents, whose first tokens nothing predicts
    one, other = (measure(model, batches(size, 16, max_tokens=200)).loss for size in (1, 5))
    assert one == pytest.approx(other, rel=1e-5)


def test_without_carrying_every_row_is_cut(model):
    documents = DocumentSet.of(TokenizedCorpus.from_documents(TEXTS, ByteTokenizer()))
    found = measure(model, held_out_batches(documents, batch_size=2, sequence_length=24, carry=False))
    whole = measure(model, batches(2, 24))
    assert found.num_targets == whole.num_targets and found.loss != pytest.approx(whole.loss, rel=1e-6)


def test_a_mixture_is_the_mean_by_weight():
    parts = {"a": HeldOutLoss(1.0, 2.0, 10), "b": HeldOutLoss(3.0, 4.0, 1000)}
    assert combined(parts, {"a": 3.0, "b": 1.0}) == HeldOutLoss(1.5, 2.5, 1010)
    assert combined({**parts, "b": HeldOutLoss(3.0, None, 1)}, {"a": 1, "b": 1}).bits_per_byte is None


def test_leaves_mode_and_generators_alone(model):
    model.train()
    before = torch.get_rng_state()
    first = measure(model, batches(3, 16))
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert measure(model, batches(3, 16)) == first


def test_stops_when_asked(model):
    asked = iter([False, True])
    assert measure(model, batches(1, 16), stop=lambda: next(asked)) is None
    assert model.training


def test_without_targets_it_is_refused(model):
    with pytest.raises(ValueError, match="too small"):
        measure(model, [])


def test_words_without_bytes():
    assert str(HeldOutLoss(1.5, None, 10)) == "loss 1.5000"
