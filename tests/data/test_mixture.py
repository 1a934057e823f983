"""Weighted mixtures: each source has its share of the tokens, goes on where it was, and positions resume exactly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_packing_loader import numbered, same

from megalodon.data import DocumentSet, Loader, Mixture

OFFSET = 10_000


def mixture(lengths: list[list[int]], weights: list[float]) -> Mixture:
    """Sets whose ids tell the set (id // OFFSET) and the place in it."""
    sets = {}
    for number, own in enumerate(lengths):
        corpus = numbered(own).corpus
        corpus.tokens[:] += number * OFFSET
        sizes = np.arange(corpus.num_tokens, dtype=np.uint32) % 5
        sets[f"s{number}"] = DocumentSet.of(replace(corpus, sizes=sizes, fingerprint=f"{number}: {own}"))
    return Mixture.weighted(sets, {f"s{i}": weight for i, weight in enumerate(weights)})


SETTINGS = {"batch_size": 4, "sequence_length": 10}


@pytest.mark.parametrize("mode", ["packed", "streamed"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_shares_are_those_of_the_weights(mode, shuffle):
    mixed = mixture([[30] * 20, [7] * 50, [400]], [1, 2, 1])
    loader = Loader(mixed, mode=mode, shuffle=shuffle, **SETTINGS)
    round_length = sum(mixed.shares)
    assert mixed.shares == (338, 675, 338)
    steps = 3 * -(-round_length // 40)
    ids = np.concatenate([next(loader).input_ids.numpy().ravel() for _ in range(steps)])
    seen = np.bincount(ids // OFFSET) / len(ids)
    assert seen == pytest.approx([0.25, 0.5, 0.25], abs=0.03)
    epochs = loader.epochs
    assert epochs["s1"] == pytest.approx(len(ids) / 2 / 350, rel=0.01) and epochs["s0"] < loader.epoch < epochs["s1"]


@settings(max_examples=40)
@given(
    lengths=st.lists(st.lists(st.integers(1, 25), min_size=1, max_size=6), min_size=2, max_size=3),
    weights=st.lists(st.floats(0.1, 5), min_size=3, max_size=3),
    seed=st.integers(0, 3),
)
def test_every_set_is_read_evenly_and_in_whole_documents(lengths, weights, seed):
    lengths[0][0] += 40
    mixed = mixture(lengths, weights[: len(lengths)])
    loader = Loader(mixed, mode="packed", seed=seed, shuffle=False, batch_size=sum(mixed.shares), sequence_length=1)
    rounds = [next(loader) for _ in range(4)]
    for number, documents in enumerate(mixed.sets):
        ids = np.concatenate([batch.input_ids.numpy().ravel() for batch in rounds])
        own = ids[ids // OFFSET == number] - number * OFFSET
        assert len(own) == 4 * mixed.shares[number]
        counts = np.bincount(own, minlength=documents.num_tokens)
        assert counts.max() - counts.min() <= 1, "each token of a set as often as the others"
    for batch in rounds:
        labels, inputs = batch.labels.numpy(), batch.input_ids.numpy()
        assert (labels[labels != -100] == inputs[labels != -100] + 1).all()
        assert batch.num_bytes is not None
    assert sum(batch.num_documents for batch in rounds) <= 4 * sum(map(len, mixed.sets)) * 30


def test_one_set_reads_as_it_does_without_a_mixture():
    alone, mixed = numbered([9, 30, 14, 60]), Mixture.of(numbered([9, 30, 14, 60]))
    for mode in ("packed", "streamed"):
        one, other = (Loader(documents, mode=mode, seed=3, **SETTINGS) for documents in (alone, mixed))
        assert all(same(next(one), next(other)) for _ in range(9))


def test_ranks_and_positions(mode="streamed"):
    make = lambda **more: Loader(mixture([[30] * 9, [7] * 20], [1, 3]), mode=mode, **SETTINGS, **more)  # noqa: E731
    whole = make()
    parts = [make(rank=rank, world_size=2) for rank in range(2)]
    batches = [next(whole) for _ in range(20)]
    for batch in batches:
        ids = torch.cat([next(part).input_ids for part in parts])
        assert torch.equal(ids, batch.input_ids)
    resumed = make()
    resumed.load_state_dict(whole.state_dict() | {"step": 7})
    assert all(same(next(resumed), batch) for batch in batches[7:])
    other = Loader(mixture([[30] * 9, [7] * 20], [1, 2]), mode=mode, **SETTINGS)
    with pytest.raises(ValueError, match="training text is another than it was: as many documents and tokens"):
        other.load_state_dict(whole.state_dict())


def test_names_are_those_of_the_sets_documents():
    mixed = mixture([[30] * 3, [7] * 5], [1, 1])
    assert [mixed.name(i) for i in (0, 2, 3, 7)] == ["doc0", "doc2", "doc0", "doc4"] and len(mixed) == 8
    batch = next(Loader(mixed, mode="packed", **SETTINGS))
    for row, origin in zip(batch.input_ids.numpy(), batch.origins, strict=True):
        number, place = divmod(int(row[0]), OFFSET)
        documents: DocumentSet = mixed.sets[number]
        index = int(np.searchsorted(documents.ends, place, side="right"))
        assert origin.names[0] == f"doc{index}" and origin.offset == place - documents.starts[index]
