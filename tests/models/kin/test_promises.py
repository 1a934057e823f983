"""What every mixer promises, in one table: nothing sees the future, pieces equal the whole, rows and documents are
alone, a state is a value."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kin_cases import CAUSAL, VOCABULARY, relative, tiny_model, tokens

from megalodon import KinConfig, KinForCausalLM, KinState
from megalodon.models.kin.mixers import MIXERS, mixer_class

LENGTHS = st.sampled_from([1, 1, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 67])
PIECES = st.lists(LENGTHS, min_size=1, max_size=8)
every_mixer = pytest.mark.parametrize("name", sorted(CAUSAL))


def bound(name: str) -> float:
    """How far float32 may be off. The delta rule divides by lengths of keys, some of which are short: of 600 random
    documents the worst was off by 6e-6, all other mixers' by 2e-6."""
    return 1e-4 if name == "gated_delta" else 1e-5


def test_the_table_is_complete() -> None:
    assert {name for name in MIXERS if mixer_class(name).causal_mode} == set(CAUSAL)


@every_mixer
def test_defaults_fit_the_width(name: str) -> None:
    model = KinForCausalLM(KinConfig(mixers=name, num_layers=2, model_dim=64, num_heads=4, vocab_size=97))
    loss = model(tokens(2, 20), labels=tokens(2, 20)).loss
    loss.backward()
    missing = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert torch.isfinite(loss) and not missing


@every_mixer
@settings(max_examples=8)
@given(length=st.integers(2, 60), data=st.data())
@torch.no_grad()
def test_no_output_sees_the_future(name: str, length: int, data: st.DataObject) -> None:
    model, x = tiny_model(name), tokens(2, length)
    place = data.draw(st.integers(1, length - 1))
    changed = x.clone()
    changed[:, place] = (changed[:, place] + 1) % VOCABULARY
    before, after = model(x).logits, model(changed).logits
    assert relative(after[:, :place], before[:, :place]) < 1e-6
    assert not torch.equal(after[:, place:], before[:, place:])


@every_mixer
@settings(max_examples=8)
@given(pieces=PIECES, batch=st.integers(1, 3))
@torch.no_grad()
def test_pieces_equal_the_whole(name: str, pieces: list[int], batch: int) -> None:
    model, x = tiny_model(name), tokens(batch, sum(pieces))
    whole = model(x, use_cache=True)
    state, logits = None, []
    for piece in x.split(pieces, 1):
        out = model(piece, past_key_values=state, use_cache=True)
        state = out.past_key_values
        logits.append(out.logits)
    assert relative(torch.cat(logits, 1), whole.logits) < bound(name)
    assert_same_state(state, whole.past_key_values)


@every_mixer
@torch.no_grad()
def test_a_hundred_pieces_equal_the_whole(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    pieces = [1, *torch.randint(1, 68, (99,), generator=generator).tolist()]
    model, x = tiny_model(name), tokens(1, sum(pieces))
    whole = model(x, use_cache=True)
    state, logits = None, []
    for piece in x.split(pieces, 1):
        out = model(piece, past_key_values=state, use_cache=True)
        state = out.past_key_values
        logits.append(out.logits)
    assert relative(torch.cat(logits, 1), whole.logits) < bound(name)
    assert_same_state(state, whole.past_key_values)


def assert_same_state(actual: KinState, expected: KinState) -> None:
    assert torch.equal(actual.position, expected.position)
    theirs = expected.state_dict()
    for name, tensor in actual.state_dict().items():
        assert tensor.shape == theirs[name].shape, name
        assert relative(tensor, theirs[name]) < 2e-5, name


@every_mixer
@settings(max_examples=6)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=2, max_size=4), left=st.booleans(), more=st.sampled_from([1, 5, 9])
)
@torch.no_grad()
def test_padded_rows_equal_each_row_alone(name: str, lengths: list[int], left: bool, more: int) -> None:
    model, batch, longest = tiny_model(name), len(lengths), max(lengths)
    x, mask = tokens(batch, longest), torch.zeros(batch, longest, dtype=torch.long)
    where = [slice(longest - n, longest) if left else slice(0, n) for n in lengths]
    for row, columns in enumerate(where):
        mask[row, columns] = 1
    following = tokens(batch, more)
    first = model(x, attention_mask=mask, use_cache=True)
    second = model(following, past_key_values=first.past_key_values, use_cache=True)
    for row, columns in enumerate(where):
        alone = model(x[row : row + 1, columns], use_cache=True)
        assert relative(first.logits[row, columns], alone.logits[0]) < bound(name)
        alone = model(following[row : row + 1], past_key_values=alone.past_key_values, use_cache=True)
        assert relative(second.logits[row], alone.logits[0]) < bound(name)
        assert second.past_key_values.position[row] == alone.past_key_values.position[0]


@every_mixer
@settings(max_examples=6)
@given(documents=st.lists(st.integers(1, 20), min_size=1, max_size=5), read=st.sampled_from([0, 5, 11]))
@torch.no_grad()
def test_packed_documents_equal_themselves_alone(name: str, documents: list[int], read: int) -> None:
    model, length = tiny_model(name), sum(documents)
    x, before = tokens(2, length), tokens(2, read)
    state = model(before, use_cache=True).past_key_values if read else None
    ids = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents)).expand(2, -1)
    out = model(x, segment_ids=ids, past_key_values=state, use_cache=True)
    for number, document in enumerate(x.split(documents, 1)):
        alone = model(document, past_key_values=state if number == 0 else None, use_cache=True)
        assert relative(out.logits[:, ids[0] == number], alone.logits) < bound(name)
    following = tokens(2, 7)
    after = model(following, past_key_values=out.past_key_values).logits
    assert relative(after, model(following, past_key_values=alone.past_key_values).logits) < bound(name)


@every_mixer
@settings(max_examples=5)
@given(read=st.integers(0, 40), more=st.integers(1, 20))
@torch.no_grad()
def test_a_state_used_twice_gives_the_same_twice(name: str, read: int, more: int) -> None:
    model, x = tiny_model(name), tokens(2, more)
    state = model(tokens(2, read), use_cache=True).past_key_values
    kept = {key: tensor.clone() for key, tensor in state.state_dict().items()}
    first = model(x, past_key_values=state, use_cache=True)
    model((x + 1) % VOCABULARY, past_key_values=state, use_cache=True)
    second = model(x, past_key_values=state, use_cache=True)
    assert torch.equal(first.logits, second.logits)
    assert all(torch.equal(kept[key], tensor) for key, tensor in state.state_dict().items())


@every_mixer
def test_gradients_flow_through_states(name: str) -> None:
    model, x = tiny_model(name), tokens(2, 29)
    weights = torch.randn(2, 29, VOCABULARY)
    (model(x, use_cache=True).logits * weights).sum().backward()
    expected = taken(model)
    state, total = None, torch.tensor(0.0)
    for piece, given_weights in zip(x.split([11, 1, 17], 1), weights.split([11, 1, 17], 1), strict=True):
        out = model(piece, past_key_values=state, use_cache=True)
        state = out.past_key_values
        total = total + (out.logits * given_weights).sum()
    total.backward()
    for key, gradient in taken(model).items():
        assert relative(gradient, expected[key]) < 1e-4, key


def taken(model: KinForCausalLM) -> dict[str, torch.Tensor]:
    found = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()
    return found


@every_mixer
@torch.no_grad()
def test_the_kind_of_state_is_what_it_says(name: str) -> None:
    model, state, sizes = tiny_model(name), None, []
    for _ in range(4):
        state = model(tokens(2, 64), past_key_values=state, use_cache=True).past_key_values
        sizes.append(state.nbytes)
    kind = mixer_class(name).kind
    assert (sizes[1] == sizes[2] == sizes[3]) == (kind == "constant")
    assert kind != "growing" or sizes[0] < sizes[1] < sizes[2] < sizes[3]


@every_mixer
@torch.no_grad()
def test_states_are_indexed_joined_reset_saved(name: str, tmp_path) -> None:
    model, x = tiny_model(name), tokens(1, 6)
    mask = torch.arange(40) < torch.tensor([11, 3, 40])[:, None]
    state = model(tokens(3, 40), attention_mask=mask.long(), use_cache=True).past_key_values
    alone = [model(x, past_key_values=state[row]).logits for row in range(3)]

    def check(other: KinState, rows: list[int]) -> None:
        logits = model(x.expand(len(rows), -1), past_key_values=other).logits
        for got, row in zip(logits, rows, strict=True):
            assert relative(got, alone[row][0]) < 1e-5

    check(state[[2, 0]], [2, 0])
    check(state.repeat(2), [0, 0, 1, 1, 2, 2])
    check(KinState.concatenate([state[1], state, state[0]]), [1, 0, 1, 2, 0])
    state.save(tmp_path / "state")
    check(KinState.load(tmp_path / "state", model.config), [0, 1, 2])
    fresh = state.reset(torch.tensor([False, True, False]))
    out = model(x.expand(3, -1), past_key_values=fresh).logits
    assert relative(out[1], model(x).logits[0]) < 1e-5
    assert relative(out[2], alone[2][0]) < 1e-5


@every_mixer
@torch.no_grad()
def test_generation_equals_reading(name: str) -> None:
    model, x = tiny_model(name), tokens(2, 9)
    mask = torch.ones_like(x)
    mask[0, :4] = 0
    out = model.generate(x, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    again = model(out, attention_mask=torch.cat([mask, torch.ones(2, 6, dtype=torch.long)], 1)).logits
    assert torch.equal(out[:, 9:], again[:, 8:-1].argmax(-1))
