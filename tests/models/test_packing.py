"""Packed documents: outputs, gradients and final states equal those of each document alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import gradient_difference, gradients, relative, state_difference, tiny_model, tokens

MODELS = {"plain": tiny_model(), "prior": tiny_model(norm_prior_count=4, share_emb=True, rescale_nffn=True)}


@settings(max_examples=25, deadline=None)
@given(
    documents=st.lists(st.integers(1, 25), min_size=1, max_size=5),
    before=st.sampled_from([0, 0, 3, 8, 13]),
    name=st.sampled_from(sorted(MODELS)),
)
def test_packed_documents_equal_each_alone(documents: list[int], before: int, name: str) -> None:
    model, length = MODELS[name], sum(documents)
    other = torch.roll(torch.tensor(documents), 1).tolist()  # the second row is cut elsewhere
    rows = [documents, other]
    x, y, prefix = tokens(2, length), tokens(2, length), tokens(2, before)
    ids = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows])

    def earlier():
        return model(prefix, use_cache=True).past_key_values if before else None

    packed = model(x, shift_labels=y, segment_ids=ids, past_key_values=earlier(), use_cache=True)
    packed.loss.backward()
    actual = gradients(model)
    state, loss = earlier(), torch.tensor(0.0)
    for row, sizes in enumerate(rows):
        at = 0
        for size in sizes:
            span = (slice(row, row + 1), slice(at, at + size))
            memory = state[row] if before and at == 0 else None
            out = model(
                x[span], shift_labels=y[span], num_items_in_batch=y.numel(), past_key_values=memory, use_cache=True
            )
            assert relative(packed.logits[span], out.logits) < 1e-5
            loss, at = loss + out.loss, at + size
        left = int(out.past_key_values.open_tokens)
        ours = packed.past_key_values[row]
        assert ours.position == out.past_key_values.position
        for mine, alone in zip(ours.layers, out.past_key_values.layers, strict=True):
            assert relative(mine.cema, alone.cema) < 1e-5
            assert relative(mine.moments.var, alone.moments.var) < 1e-5
            assert relative(mine.chunk.keys[:, :left], alone.chunk.keys[:, :left]) < 1e-5
            assert relative(mine.chunk.values[:, :left], alone.chunk.values[:, :left]) < 1e-5
    loss.backward()
    assert gradient_difference(actual, gradients(model)) < 1e-4


def test_sliced_loss_equals_the_loss_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = MODELS["plain"], tokens(2, 30)
    labels = x.clone()
    labels[0, :7] = -100
    whole = model(x, labels=labels)
    whole.loss.backward()
    expected = gradients(model)
    monkeypatch.setattr("megalodon.models.loss.LOGITS_AT_ONCE", 61 * 11)
    sliced = model(x, labels=labels, return_logits=False)
    assert sliced.logits is None
    sliced.loss.backward()
    assert float(sliced.loss) == pytest.approx(float(whole.loss), rel=1e-6)
    assert gradient_difference(gradients(model), expected) < 1e-5


def test_gradient_checkpointing_with_a_carried_state() -> None:
    model, x = tiny_model().train(), tokens(2, 24)

    def run() -> dict[str, torch.Tensor]:
        first = model(x[:, :11], labels=x[:, :11], use_cache=True)
        second = model(x[:, 11:], labels=x[:, 11:], past_key_values=first.past_key_values, use_cache=True)
        (first.loss + second.loss).backward()
        return gradients(model)

    expected = run()
    model.gradient_checkpointing_enable()
    assert gradient_difference(run(), expected) < 1e-5


@torch.no_grad()
def test_padding_and_documents_together() -> None:
    model, x = MODELS["plain"], tokens(2, 20)
    ids = (torch.arange(20) >= 12).long().expand(2, -1)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :5] = 0
    out = model(x, attention_mask=mask, segment_ids=ids, use_cache=True)
    assert relative(out.logits[0, 5:12], model(x[:1, 5:12]).logits[0]) < 1e-5
    assert relative(out.logits[0, 12:], model(x[:1, 12:]).logits[0]) < 1e-5
    alone = model(x[1:, 12:], use_cache=True).past_key_values
    assert state_difference(out.past_key_values[1], alone) < 1e-5


def test_dropout_acts_in_training_only() -> None:
    model, x = tiny_model(dropout=0.2, hidden_dropout=0.2, attention_dropout=0.2), tokens(1, 20)
    assert torch.equal(model.eval()(x).logits, model(x).logits)
    model.train()
    assert not torch.equal(model(x).logits, model(x).logits)
    model(x, labels=x).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
