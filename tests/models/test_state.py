"""The state: any pieces equal the whole, forks are independent, and what can be made of a state keeps its meaning."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import VOCABULARY, gradient_difference, gradients, relative, state_difference, tiny_model, tokens

from megalodon import MegalodonState
from megalodon.models import causal_lm as modeling
from megalodon.models.layers.timestep_norm import TimestepNorm

MODEL = tiny_model()
PIECES = st.lists(st.sampled_from([1, 1, 2, 3, 7, 8, 9, 16, 20]), min_size=1, max_size=7)


@settings(max_examples=20, deadline=None)
@given(pieces=PIECES, batch=st.integers(1, 3))
def test_pieces_equal_the_whole_in_training(pieces: list[int], batch: int) -> None:
    x, y = tokens(batch, sum(pieces)), tokens(batch, sum(pieces))
    whole = MODEL(x, shift_labels=y, use_cache=True)
    whole.loss.backward()
    expected = gradients(MODEL)
    state, loss, logits = None, torch.tensor(0.0), []
    for piece, targets in zip(x.split(pieces, 1), y.split(pieces, 1), strict=True):
        out = MODEL(piece, shift_labels=targets, num_items_in_batch=y.numel(), past_key_values=state, use_cache=True)
        state, loss = out.past_key_values, loss + out.loss
        logits.append(out.logits)
    loss.backward()
    assert relative(torch.cat(logits, 1), whole.logits) < 1e-5
    assert state_difference(state, whole.past_key_values) < 1e-5
    assert gradient_difference(gradients(MODEL), expected) < 1e-4


@settings(max_examples=20, deadline=None)
@given(pieces=PIECES, batch=st.integers(1, 3))
@torch.no_grad()
def test_a_state_may_be_used_again(pieces: list[int], batch: int) -> None:
    x = tokens(batch, sum(pieces))
    whole = MODEL(x, use_cache=True)
    state, logits = None, []
    for piece in x.split(pieces, 1):
        out = MODEL(piece, past_key_values=state, use_cache=True)
        MODEL((piece + 1) % VOCABULARY, past_key_values=state, use_cache=True)  # a fork that must leave no trace
        again = MODEL(piece, past_key_values=state, use_cache=True)
        assert relative(again.logits, out.logits) < 5e-6
        state = out.past_key_values
        logits.append(out.logits)
    assert relative(torch.cat(logits, 1), whole.logits) < 1e-5
    assert state_difference(state, whole.past_key_values) < 1e-5


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=2, max_size=4), left=st.booleans(), more=st.sampled_from([1, 5, 9])
)
@torch.no_grad()
def test_padded_rows_equal_each_row_alone(lengths: list[int], left: bool, more: int) -> None:
    batch, longest = len(lengths), max(lengths)
    x, mask = tokens(batch, longest), torch.zeros(batch, longest, dtype=torch.long)
    where = [slice(longest - n, longest) if left else slice(0, n) for n in lengths]
    for row, columns in enumerate(where):
        mask[row, columns] = 1
    following, last = tokens(batch, more), tokens(batch, 1)
    first = MODEL(x, attention_mask=mask, use_cache=True)
    second = MODEL(following, past_key_values=first.past_key_values, use_cache=True)
    third = MODEL(last, past_key_values=second.past_key_values, use_cache=True)
    for row, columns in enumerate(where):
        alone = MODEL(x[row : row + 1, columns], use_cache=True)
        assert relative(first.logits[row, columns], alone.logits[0]) < 1e-5
        alone = MODEL(following[row : row + 1], past_key_values=alone.past_key_values, use_cache=True)
        assert relative(second.logits[row], alone.logits[0]) < 1e-5
        alone = MODEL(last[row : row + 1], past_key_values=alone.past_key_values, use_cache=True)
        assert relative(third.logits[row], alone.logits[0]) < 1e-5
        assert third.past_key_values.position[row] == alone.past_key_values.position[0]


@torch.no_grad()
def test_size_does_not_depend_on_what_was_read() -> None:
    state, sizes = None, {}
    for _ in range(12):
        state = MODEL(tokens(2, 4), past_key_values=state, use_cache=True).past_key_values
        sizes.setdefault(int(state.open_tokens[0]), set()).add(state.nbytes)
    assert sizes.keys() == {0, 4} and all(len(seen) == 1 for seen in sizes.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("length", [0, 5])
@torch.no_grad()
def test_the_state_of_nothing_has_the_dtypes_of_any(dtype: torch.dtype, length: int) -> None:
    model = tiny_model().to(dtype).eval()
    empty, state = model.model.empty_state(2), model(tokens(2, length), use_cache=True).past_key_values
    kinds = {name: tensor.dtype for name, tensor in state.state_dict().items()}
    assert {name: tensor.dtype for name, tensor in empty.state_dict().items()} == kinds
    assert empty.position.tolist() == [0, 0]
    x = tokens(2, 11)
    assert relative(model(x, past_key_values=empty).logits, model(x).logits) < (
        1e-2 if dtype == torch.bfloat16 else 1e-6
    )


@torch.no_grad()
def state_at(*lengths: int) -> MegalodonState:
    longest = max(lengths)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return MODEL(tokens(len(lengths), longest), attention_mask=mask.long(), use_cache=True).past_key_values


@torch.no_grad()
def test_index_repeat_concatenate() -> None:
    state, x = state_at(11, 3, 16), tokens(1, 6)
    alone = [MODEL(x, past_key_values=state[row], use_cache=True).logits for row in range(3)]

    def check(other: MegalodonState, rows: list[int]) -> None:
        assert other.batch_size == len(rows)
        logits = MODEL(x.expand(len(rows), -1), past_key_values=other).logits
        for got, row in zip(logits, rows, strict=True):
            assert relative(got, alone[row][0]) < 1e-5

    check(state[[2, 0]], [2, 0])
    check(state[torch.tensor([True, False, True])], [0, 2])
    check(state[-2:], [1, 2])
    check(state.repeat(2), [0, 0, 1, 1, 2, 2])
    check(MegalodonState.concatenate([state[1], state, state[0]]), [1, 0, 1, 2, 0])
    check(state.to("cpu", torch.float32), [0, 1, 2])


@torch.no_grad()
def test_reset_rows_start_afresh() -> None:
    state, x = state_at(11, 5), tokens(2, 10)
    out = MODEL(x, past_key_values=state.reset(torch.tensor([False, True])), use_cache=True)
    assert relative(out.logits[0], MODEL(x[:1], past_key_values=state[0]).logits[0]) < 1e-5
    assert relative(out.logits[1], MODEL(x[1:]).logits[0]) < 1e-5
    assert state.position.tolist() == [11, 5]


def test_detach_cuts_gradients() -> None:
    state = MODEL(tokens(1, 5), use_cache=True).past_key_values
    assert state.final.mean.requires_grad and not state.detach().final.mean.requires_grad
    assert not any(t.requires_grad for t in state.detach().state_dict().values())


@torch.no_grad()
def test_save_and_load(tmp_path: Path) -> None:
    state = state_at(11, 3)
    path = tmp_path / "context.safetensors"
    state.save(path, {"note": "chapter 1"})
    loaded = MegalodonState.load(path, MODEL.config)
    x = tokens(2, 9)
    assert torch.equal(MODEL(x, past_key_values=loaded).logits, MODEL(x, past_key_values=state).logits)
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match=r"chunk_size 8 .the model has 16"):
        MegalodonState.load(path, tiny_model(chunk_size=16).config)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        MegalodonState.load(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"past_key_values": state_at(3)}, "past_key_values has 1 rows"),
        ({"past_key_values": (1, 2)}, "past_key_values is a tuple"),
        ({"attention_mask": torch.ones(2, 3)}, "attention_mask"),
        ({"segment_ids": torch.ones(2, 3)}, "segment_ids"),
        ({"input_ids": torch.full((2, 4), VOCABULARY)}, "input_ids has values"),
        ({"labels": torch.zeros(2, 3)}, "labels"),
    ],
)
def test_bad_input_names_the_argument(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MODEL(**{"input_ids": tokens(2, 4), **arguments})


def test_state_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"norm_num_groups 4 .the model has 8"):
        tiny_model(norm_num_groups=8)(tokens(1, 2), past_key_values=state_at(4))


def lengths_of_pieces(model, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by the length of every piece that goes through the model."""
    lengths: list[int] = []
    forward = TimestepNorm.forward

    def counted(self, x, *given):
        if self is model.model.final_norm:
            lengths.append(x.shape[1])
        return forward(self, x, *given)

    monkeypatch.setattr(TimestepNorm, "forward", counted)
    return lengths


@pytest.mark.parametrize("start", [0, 3, 8])
@pytest.mark.parametrize("embedded", [False, True])
@torch.no_grad()
def test_long_texts_go_through_in_pieces_unseen(start: int, embedded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model().double().eval()
    x = tokens(2, 53)
    state = model(x[:, :start], use_cache=True).past_key_values if start else None
    rest = {"inputs_embeds": model.model.embed_tokens(x[:, start:])} if embedded else {"input_ids": x[:, start:]}
    whole = model(**rest, past_key_values=state, use_cache=True)
    lengths = lengths_of_pieces(model, monkeypatch)
    monkeypatch.setattr(modeling, "READ_AT_ONCE", 16)
    out = model(**rest, past_key_values=state, use_cache=True)
    assert len(lengths) > 2 and sum(lengths) == 53 - start and (start + lengths[0]) % 8 == 0
    assert relative(out.logits, whole.logits) < 1e-12
    assert state_difference(out.past_key_values, whole.past_key_values) < 1e-12
    assert model(**rest, past_key_values=state, use_cache=False).past_key_values is None
    seen: list[int] = []
    with model.model.layers[0].cema.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[1])):
        model(**rest, past_key_values=state)
    assert seen == [53 - start]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("use_cache", [False, True])
def test_long_rows_train_in_pieces(monkeypatch, checkpointing: bool, use_cache: bool):
    """Losses, states, and gradients of weights and of what was carried in are those of the whole row."""
    model = tiny_model(chunk_size=8).double().train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    x = tokens(2, 77)
    lengths = lengths_of_pieces(model, monkeypatch)

    def trained():
        model.zero_grad()
        state = model(x[:, :5], use_cache=True).past_key_values
        output = model(x[:, 5:], labels=x[:, 5:], past_key_values=state, use_cache=use_cache)
        after = output.past_key_values
        total = output.loss
        if after is not None:
            total = total + sum(
                value.square().sum() for value in after.state_dict().values() if value.is_floating_point()
            )
        total.backward()
        return total.detach(), after, [parameter.grad.clone() for parameter in model.parameters()]

    expected, state, gradients = trained()
    assert lengths == [5, 72]
    monkeypatch.setattr(modeling, "READ_AT_ONCE", 16)
    actual, again, others = trained()
    assert lengths[2:] == [5, 11, 16, 16, 16, 13]
    assert relative(actual, expected) < 1e-12
    assert (again is None) == (state is None) == (not use_cache)
    assert state is None or state_difference(again, state) < 1e-12
    assert all(relative(other, gradient) < 1e-10 for other, gradient in zip(others, gradients, strict=True))


@pytest.mark.parametrize("begins", range(8))
def test_loaded_numbers_stand_where_complex_kernels_read_them(begins: int, tmp_path: Path) -> None:
    """In a file mapped into memory, float64 stands at multiples of 8 bytes; complex128 needs 16 or ends the process."""
    model, ids = tiny_model().double().eval(), tokens(2, 13)
    with torch.no_grad():
        state = model(ids, use_cache=True).past_key_values
        state.save(tmp_path / "state", {"note": "x" * 2 * begins})
        loaded = MegalodonState.load(tmp_path / "state", model.config)
        assert [layer.cema.data_ptr() % 16 for layer in loaded.layers] == [0, 0]
        expected = model(ids, past_key_values=state).logits
        assert torch.equal(model(ids, past_key_values=loaded.reset(torch.tensor([False, False]))).logits, expected)
