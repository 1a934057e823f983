"""The held-out loss: the model's loss on the documents alone, whatever the batches they are read in."""

from __future__ import annotations

import math

import pytest
import torch

from megalodon import MegalodonConfig, MegalodonForCausalLM
from megalodon.data import ByteTokenizer, DocumentSet, TokenizedCorpus, held_out_batches
from megalodon.training.heldout import HeldOutLoss, measure_heldout

CPU = torch.device("cpu")
TEXTS = [("a", "the whale swam " * 9), ("b", "é" * 40), ("c", "stone and water " * 5)]


@pytest.fixture
def model():
    sizes = {"num_layers": 1, "model_dim": 32, "z_dim": 16, "value_dim": 32, "ffn_hidden_dim": 48, "cema_ndim": 4}
    return MegalodonForCausalLM(MegalodonConfig(vocab_size=256, norm_num_groups=4, chunk_size=16, dropout=0.5, **sizes))


def batches(batch_size, sequence_length):
    documents = DocumentSet.of(TokenizedCorpus.from_documents(TEXTS, ByteTokenizer()))
    return held_out_batches(documents, batch_size=batch_size, sequence_length=sequence_length)


def measure(model, batches, **arguments):
    return measure_heldout(model, batches, device=CPU, precision="float32", **arguments)


def test_equals_the_documents_read_alone(model):
    model.eval()
    nats, targets, size = 0.0, 0, 0
    with torch.no_grad():
        for _, text in TEXTS:
            ids = torch.tensor([[*text.encode(), 0]])
            nats += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            targets += ids.shape[1] - 1
            size += len(text.encode()) - 1  # nothing predicts a document's first byte
    measured = measure(model, batches(batch_size=1, sequence_length=19))
    assert measured.num_targets == targets
    assert measured.loss == pytest.approx(nats / targets, rel=1e-5)
    assert measured.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert "bits per byte" in str(measured)


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
