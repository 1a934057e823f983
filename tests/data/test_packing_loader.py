"""Packing and the loader, by their promises: each token an input once per epoch, labels are the next tokens, nothing
crosses documents when isolated, positions resume exactly, ranks make the global batch, carried states join seamlessly.

Every token of the drawn corpora has its own id, so a batch's ids say where each token came from.
"""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalodon.data import Batch, DocumentSet, Loader, TokenizedCorpus, held_out_batches
from megalodon.data.packing import endless

LENGTHS = st.lists(st.integers(1, 25), min_size=1, max_size=12)


def numbered(lengths: list[int]) -> DocumentSet:
    """Documents whose token ids are 0, 1, 2, ... throughout; an id stands for as many bytes as its value modulo 5."""
    total = sum(lengths)
    return DocumentSet.of(
        TokenizedCorpus(
            tokens=np.arange(total, dtype=np.uint32),
            offsets=np.cumsum([0, *lengths], dtype=np.int64),
            document_bytes=np.array(lengths, dtype=np.int64),
            names=[f"doc{i}" for i in range(len(lengths))],
            vocab_size=total,
            eos_token_id=None,
            token_lengths=np.arange(total, dtype=np.int64) % 5,
            document_hashes=np.arange(len(lengths), dtype=np.uint64),
            tokenizer_name="numbers",
            tokenizer_fingerprint="numbers",
            fingerprint=str(lengths),
            max_token_id=total - 1,
        )
    )


@st.composite
def setups(draw, mode: str | None = None) -> dict:
    lengths = draw(LENGTHS)
    length = draw(st.integers(1, 12))
    rows = draw(st.sampled_from([1, 2, 4, 6]))
    lengths[0] += max(rows, length + 1)
    return {
        "documents": numbered(lengths),
        "mode": mode or draw(st.sampled_from(["packed", "streamed", "reset"])),
        "batch_size": rows,
        "sequence_length": length,
        "seed": draw(st.integers(0, 3)),
        "isolate": draw(st.booleans()),
        "shuffle": draw(st.booleans()),
    }


def document_of(documents: DocumentSet, ids: np.ndarray) -> np.ndarray:
    return np.searchsorted(documents.ends, ids, side="right")


def same(one: Batch, other: Batch) -> bool:
    pairs = [(getattr(one, k), getattr(other, k)) for k in ("input_ids", "labels", "segment_ids", "continues")]
    tensors = all((a is None and b is None) or torch.equal(a, b) for a, b in pairs)
    return tensors and one.origins == other.origins and one.num_bytes == other.num_bytes


@given(setup=setups())
def test_every_token_is_an_input_once_per_epoch(setup):
    documents, length, rows = setup["documents"], setup["sequence_length"], setup["batch_size"]
    total, loader = documents.num_tokens, Loader(**setup)
    if setup["mode"] != "packed":  # row r has its own span of every epoch
        steps = -(-2 * total // (rows * length)) + 2
        read = torch.cat([next(loader).input_ids for _ in range(steps)], dim=1).numpy()
        spans = [((r + 1) * total // rows) - (r * total // rows) for r in range(rows)]
        for epoch in range(2):
            ids = np.concatenate([row[epoch * n : (epoch + 1) * n] for row, n in zip(read, spans, strict=True)])
            assert sorted(ids) == list(range(total))
        return
    block = total // length  # windows of a block are shuffled; whole blocks are the beginning of the endless stream
    steps = -(-2 * block // rows)
    read = torch.cat([next(loader).input_ids for _ in range(steps)]).numpy()[: 2 * block].ravel()
    counts = np.bincount(read, minlength=total)
    whole, rest = divmod(2 * block * length, total)
    assert set(counts) <= {whole, whole + 1} and (counts == whole + 1).sum() == rest


def turns(setup: dict, step: int) -> np.ndarray:
    """[B, L] bool: where a streamed row turns from the end of its span to the beginning of that of the next epoch."""
    rows, length, total = setup["batch_size"], setup["sequence_length"], setup["documents"].num_tokens
    if setup["mode"] == "packed":
        return np.zeros((rows, length), dtype=bool)
    spans = np.diff(np.arange(rows + 1) * total // rows)[:, None]
    return (step * length + np.arange(length) + 1) % spans == 0


@given(setup=setups())
def test_labels_are_the_next_tokens_and_keep_to_documents_when_isolated(setup):
    documents, isolate = setup["documents"], setup["isolate"]
    loader = Loader(**setup)
    for step in range(4):
        batch = next(loader)
        ids, labels = batch.input_ids.numpy(), batch.labels.numpy()
        assert ids.shape == labels.shape == (setup["batch_size"], setup["sequence_length"])
        source, has = document_of(documents, ids), labels != -100
        inside = has & (document_of(documents, labels) == source) & (labels == ids + 1)
        last_of_document = np.isin(ids, documents.ends - 1)
        # Inside a document the label is the id plus one, always; a document's last token has none, or the next first.
        assert inside[~last_of_document].all()
        if isolate:
            assert not has[last_of_document].any()
        else:
            assert np.isin(labels[last_of_document & has], documents.starts).all()
            goes_on = has[:, :-1] & ~turns(setup, step)[:, :-1]
            assert (labels[:, :-1] == ids[:, 1:])[goes_on].all()
        assert batch.num_tokens == has.sum()
        assert batch.num_bytes == (labels[has] % 5).sum()


@given(setup=setups())
def test_segments_change_exactly_where_the_text_is_not_continuous(setup):
    documents, loader = setup["documents"], Loader(**setup)
    for step in range(4):
        batch = next(loader)
        ids = batch.input_ids.numpy()
        source = document_of(documents, ids)
        breaks = (source[:, 1:] != source[:, :-1]) | (ids[:, 1:] != ids[:, :-1] + 1) | turns(setup, step)[:, :-1]
        if batch.segment_ids is None:
            assert not setup["isolate"] or not breaks.any()
        else:
            segments = batch.segment_ids.numpy()
            assert setup["isolate"] and np.array_equal(segments[:, 1:] != segments[:, :-1], breaks)
            assert (np.diff(segments, axis=1) >= 0).all() and not segments[:, 0].any()


@given(setup=setups(mode="streamed"))
def test_a_row_continues_exactly_where_its_next_token_is_the_next_of_its_document(setup):
    loader, documents = Loader(**setup), setup["documents"]
    before = next(loader)
    assert not before.continues.any()
    for step in range(1, 7):
        batch = next(loader)
        last, first = before.input_ids[:, -1].numpy(), batch.input_ids[:, 0].numpy()
        joined = (first == last + 1) & (document_of(documents, first) == document_of(documents, last))
        joined &= ~turns(setup, step - 1)[:, -1]  # the next epoch's text may follow by chance, yet begins afresh
        assert np.array_equal(batch.continues.numpy(), joined if setup["isolate"] else np.ones_like(joined))
        before = batch


@given(setup=setups(), stop=st.integers(0, 30))
def test_a_resumed_loader_goes_on_exactly(setup, stop):
    loader = Loader(**setup)
    for _ in range(stop):
        next(loader)
    state = loader.state_dict()
    expected = [next(loader) for _ in range(3)]
    resumed = Loader(**setup)
    next(resumed)
    resumed.load_state_dict(state)
    assert resumed.epoch == pytest.approx(
        stop * setup["batch_size"] * setup["sequence_length"] / setup["documents"].num_tokens
    )
    assert all(same(next(resumed), batch) for batch in expected)
    assert same(resumed.batch_at(stop), expected[0])


@given(setup=setups(), world=st.sampled_from([1, 2]))
def test_ranks_together_make_the_global_batch(setup, world):
    setup["batch_size"] *= world
    setup["documents"] = numbered([30, *np.diff(setup["documents"].ends).tolist()])
    whole, ranks = Loader(**setup), [Loader(**setup, rank=r, world_size=world) for r in range(world)]
    for _ in range(3):
        batch, parts = next(whole), [next(rank) for rank in ranks]
        for key in ("input_ids", "labels"):
            assert torch.equal(torch.cat([getattr(part, key) for part in parts]), getattr(batch, key))
        if batch.continues is not None:
            assert torch.equal(torch.cat([part.continues for part in parts]), batch.continues)
        assert [origin for part in parts for origin in part.origins] == batch.origins
        assert sum(part.num_tokens for part in parts) == batch.num_tokens
    assert ranks[0].state_dict() == whole.state_dict()


@given(setup=setups(mode="streamed"))
def test_reset_rows_are_the_streamed_ones_alone(setup):
    streamed, reset = Loader(**setup), Loader(**setup | {"mode": "reset"})
    for _ in range(5):
        one, other = next(streamed), next(reset)
        assert torch.equal(one.input_ids, other.input_ids) and torch.equal(one.labels, other.labels)
        assert one.continues is not None and other.continues is None


@given(setup=setups())
def test_origins_name_the_documents_of_each_row(setup):
    loader, documents = Loader(**setup), setup["documents"]
    for _ in range(3):
        batch = next(loader)
        for ids, origin in zip(batch.input_ids.numpy(), batch.origins, strict=True):
            source = document_of(documents, ids)
            assert set(origin.names) == {documents.name(i) for i in source}
            assert origin.names[0] == documents.name(source[0])
            assert origin.offset == ids[0] - documents.starts[source[0]]


def test_the_origin_reads_well_and_counts_from_the_documents_beginning():
    whole = numbered([40])
    tail = DocumentSet(whole.corpus, whole.indices, whole.starts + 30, whole.ends)
    batch = next(Loader(tail, mode="streamed", batch_size=1, sequence_length=4, shuffle=False))
    assert str(batch.origins[0]) == "doc0 from token 30"
    several = next(Loader(numbered([3, 3, 3]), mode="packed", batch_size=1, sequence_length=8, shuffle=False))
    assert str(several.origins[0]) == "doc0 from token 0 and 2 more, up to doc2"


def test_epochs_are_shuffled_by_the_seed_anew():
    documents = numbered([5] * 40)

    def epoch(seed: int, number: int) -> list[int]:
        loader = Loader(documents, mode="streamed", batch_size=1, sequence_length=100, seed=seed)
        return [i for step in (0, 1) for i in loader.batch_at(2 * number + step).input_ids.flatten().tolist()]

    assert epoch(0, 0) == epoch(0, 0)
    assert epoch(0, 0) != epoch(0, 1) and epoch(0, 0) != epoch(1, 0)
    assert epoch(0, 0) != sorted(epoch(0, 0)) == sorted(epoch(0, 1)) == list(range(200))


def test_packed_rows_of_one_long_document_come_from_everywhere():
    batch = next(Loader(numbered([10_000]), mode="packed", batch_size=8, sequence_length=10))
    assert np.ptp(batch.input_ids[:, 0].numpy()) > 1000 and batch.continues is None


@given(
    lengths=LENGTHS,
    rows=st.sampled_from([1, 2, 4]),
    length=st.integers(1, 12),
    limit=st.sampled_from([None, 1, 7, 30]),
    world=st.sampled_from([1, 2]),
)
def test_held_out_batches_hold_every_text_once_and_none_is_cut(lengths, rows, length, limit, world):
    documents, rows = numbered(lengths), rows * world
    sizes = {"batch_size": rows, "sequence_length": length, "max_tokens": limit}
    batches = list(held_out_batches(documents, **sizes))
    assert all(batch.input_ids.shape == (rows, length) for batch in batches)
    assert all(same(a, b) for a, b in zip(batches, held_out_batches(documents, **sizes), strict=True))
    labels = torch.cat([batch.labels for batch in batches]).numpy().ravel()
    total = min(documents.num_tokens, limit or documents.num_tokens)
    assert np.array_equal(np.sort(labels[labels != -100]), np.setdiff1d(np.arange(total), documents.starts))
    read = torch.cat([batch.input_ids for batch in batches], dim=1).numpy()
    scored = torch.cat([batch.labels for batch in batches], dim=1).numpy()
    for row, targets in zip(read, scored, strict=True):
        assert np.array_equal(targets[targets != -100], row[:][targets != -100] + 1)
        filled = np.flatnonzero(targets != -100)
        for place in filled[(filled > 0)]:  # what is scored goes on from its document's beginning
            assert row[place] in documents.starts or row[place - 1] == row[place] - 1
    for batch in batches:
        marks, targets = batch.segment_ids, batch.labels.numpy()[:, :-1] != -100
        if marks is not None:
            assert not (targets & (marks[:, 1:] != marks[:, :-1]).numpy()).any()
        for origin in batch.origins:
            assert origin.names[0] in documents.corpus.names
    split = [list(held_out_batches(documents, **sizes, rank=r, world_size=world)) for r in range(world)]
    for parts, batch in zip(zip(*split, strict=True), batches, strict=True):
        assert torch.equal(torch.cat([part.input_ids for part in parts]), batch.input_ids)
        assert torch.equal(torch.cat([part.continues for part in parts]), batch.continues)


def test_held_out_rows_are_about_equally_long():
    batches = list(held_out_batches(numbered([50, 10, 10, 10, 10, 10, 4]), batch_size=2, sequence_length=10))
    assert len(batches) == 6 and batches[0].origins[1].names == ("doc1",)


@settings(max_examples=30)
@given(setup=setups(), data=st.data())
def test_documents_are_counted_where_they_begin(setup, data):
    loader = Loader(**setup)
    steps = data.draw(st.integers(1, 12))
    whole = sum(next(loader).num_documents for _ in range(steps))
    epochs = loader.epoch
    if setup["mode"] == "packed" and not setup["shuffle"]:
        assert int(epochs) * len(setup["documents"]) <= whole <= (int(epochs) + 1) * len(setup["documents"])
    if setup["mode"] == "packed" and setup["batch_size"] == 1 and steps * setup["sequence_length"] > 0:
        assert whole >= int(epochs)


@given(lengths=LENGTHS, rows=st.sampled_from([1, 3]), length=st.integers(1, 9))
def test_held_out_rows_continue_within_documents_only(lengths, rows, length):
    lengths[0] += 3
    documents = numbered(lengths)
    before = None
    for batch in held_out_batches(documents, batch_size=rows, sequence_length=length):
        if before is None:
            assert not batch.continues.any()
        else:
            for r in torch.nonzero(batch.continues).flatten().tolist():
                assert batch.input_ids[r, 0] == before.input_ids[r, -1] + 1
                assert int(batch.input_ids[r, 0]) not in documents.starts
        before = batch


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "woven"}, "mode is 'woven'; give packed, streamed or reset"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"sequence_length": -1}, "sequence_length is -1"),
        ({"batch_size": 3, "world_size": 2}, "batch_size is 3; it must be a multiple of world_size 2"),
        ({"rank": 2, "world_size": 2}, "rank is 2; with world_size 2 it must be 0 to 1"),
        ({"sequence_length": 60}, "60 tokens; batch_size 4 and sequence_length 60 in mode streamed need at least 61"),
        ({"batch_size": 61}, "need at least 61"),
    ],
)
def test_sizes_are_checked(change, message):
    settings_ = {"mode": "streamed", "batch_size": 4, "sequence_length": 8} | change
    with pytest.raises(ValueError, match=message):
        Loader(numbered([60]), **settings_)


def test_a_position_of_other_settings_is_refused():
    settings_ = {"mode": "packed", "batch_size": 4, "sequence_length": 8}
    state = Loader(numbered([60]), **settings_).state_dict()
    with pytest.raises(ValueError, match="sequence_length was 8 and is 4"):
        Loader(numbered([60]), **(settings_ | {"sequence_length": 4})).load_state_dict(state)
    with pytest.raises(ValueError, match=r"text is another than it was: 1 documents with 60 tokens before, 2 "):
        Loader(numbered([30, 30]), **settings_).load_state_dict(state)
    with pytest.raises(ValueError, match="saved step is None"):
        Loader(numbered([60]), **settings_).load_state_dict({k: v for k, v in state.items() if k != "step"})
    with pytest.raises(ValueError, match=r"tokenizer of the training text is another"):
        Loader(numbered([30, 30]), **settings_).load_state_dict(state | {"tokenizer": "letters"})
    with pytest.raises(ValueError, match="saved by an earlier version"):
        Loader(numbered([30, 30]), **settings_).load_state_dict({k: v for k, v in state.items() if "num" not in k})


def test_a_batch_moves_to_a_device():
    batch = next(Loader(numbered([9, 9]), mode="streamed", batch_size=2, sequence_length=8))
    moved = batch.to("meta")
    assert moved.input_ids.device.type == moved.labels.device.type == moved.continues.device.type == "meta"
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64 and batch.continues.dtype == torch.bool


@settings(max_examples=50)
@given(start=st.integers(0, 5), size=st.integers(1, 9), position=st.integers(0, 40), count=st.integers(0, 30))
def test_endless_repetition(start, size, position, count):
    stretches = endless(start, start + size, position, count)
    read = [(s.epoch, i) for s in stretches for i in range(s.start, s.stop)]
    assert read == [(p // size, start + p % size) for p in range(position, position + count)]


@pytest.mark.parametrize("mode", ["packed", "streamed"])
def test_a_batch_takes_no_time_beside_a_training_step(mode):
    loader = Loader(numbered([40] * 50_000), mode=mode, batch_size=8, sequence_length=512)
    next(loader)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        next(loader)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.005  # about half a millisecond; the bound leaves room for a loaded machine
