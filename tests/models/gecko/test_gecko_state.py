"""Gecko's state: any pieces equal the whole, rows stand anywhere, and what is made of a state keeps its meaning."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gecko_cases import BOS, segmented_gecko, state_difference, tiny_gecko
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import VOCABULARY, gradient_difference, gradients, relative, tiny_model, tokens
from torch import Tensor

from megalodon import GeckoConfig, GeckoForCausalLM, GeckoState, MegalodonConfig, MegalodonForCausalLM, MegalodonState
from megalodon.models import causal_lm as modeling

MODELS = {
    "plain": tiny_gecko(),
    "two hops": tiny_gecko(two_hop_residual=True, num_rope_heads=1, layernorm_num_groups=2, rescale_nffn=True),
    "segments": segmented_gecko(num_rope_heads=0, share_emb=True, scale_emb=True),
}
NAMES = st.sampled_from(sorted(MODELS))
PIECES = st.lists(st.sampled_from([1, 1, 2, 3, 7, 8, 9, 16, 20]), min_size=1, max_size=7)


def text(batch: int, length: int) -> Tensor:
    """Random token ids, one in twelve of which begins a segment in a model that knows them."""
    return torch.where(torch.rand(batch, length) < 1 / 12, BOS, tokens(batch, length))


@settings(max_examples=30, deadline=None)
@given(pieces=PIECES, batch=st.integers(1, 3), name=NAMES)
def test_pieces_equal_the_whole_in_training(pieces: list[int], batch: int, name: str) -> None:
    model = MODELS[name]
    x, y = text(batch, sum(pieces)), tokens(batch, sum(pieces))
    whole = model(x, shift_labels=y, use_cache=True)
    whole.loss.backward()
    expected = gradients(model)
    without_cache = model(x, shift_labels=y, use_cache=False)
    assert relative(without_cache.logits, whole.logits) < 5e-6
    state, loss, logits = None, torch.tensor(0.0), []
    for piece, targets in zip(x.split(pieces, 1), y.split(pieces, 1), strict=True):
        out = model(piece, shift_labels=targets, num_items_in_batch=y.numel(), past_key_values=state, use_cache=True)
        state, loss = out.past_key_values, loss + out.loss
        logits.append(out.logits)
    loss.backward()
    assert relative(torch.cat(logits, 1), whole.logits) < 1e-5
    assert state_difference(state, whole.past_key_values) < 1e-5
    assert gradient_difference(gradients(model), expected) < 1e-4


@settings(max_examples=30, deadline=None)
@given(pieces=PIECES, batch=st.integers(1, 3), name=NAMES)
@torch.no_grad()
def test_a_state_may_be_used_again(pieces: list[int], batch: int, name: str) -> None:
    model, x = MODELS[name].eval(), text(batch, sum(pieces))
    whole = model(x, use_cache=True)
    state, logits = None, []
    for piece in x.split(pieces, 1):
        out = model(piece, past_key_values=state, use_cache=True)
        model((piece + 1) % VOCABULARY, past_key_values=state, use_cache=True)  # a fork that must leave no trace
        again = model(piece, past_key_values=state, use_cache=True)
        assert relative(again.logits, out.logits) < 5e-6
        state = out.past_key_values
        logits.append(out.logits)
    assert relative(torch.cat(logits, 1), whole.logits) < 1e-5
    assert state_difference(state, whole.past_key_values) < 1e-5


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=2, max_size=4),
    left=st.booleans(),
    more=st.sampled_from([1, 5, 9, 20]),
    name=NAMES,
)
@torch.no_grad()
def test_padded_rows_equal_each_row_alone(lengths: list[int], left: bool, more: int, name: str) -> None:
    model, batch, longest = MODELS[name].eval(), len(lengths), max(lengths)
    x, mask = text(batch, longest), torch.zeros(batch, longest, dtype=torch.long)
    where = [slice(longest - n, longest) if left else slice(0, n) for n in lengths]
    for row, columns in enumerate(where):
        mask[row, columns] = 1
    following, last = text(batch, more), text(batch, 1)
    first = model(x, attention_mask=mask, use_cache=True)
    second = model(following, past_key_values=first.past_key_values, use_cache=True)
    third = model(last, past_key_values=second.past_key_values, use_cache=True)
    for row, columns in enumerate(where):
        alone = model(x[row : row + 1, columns], use_cache=True)
        assert relative(first.logits[row, columns], alone.logits[0]) < 1e-5
        alone = model(following[row : row + 1], past_key_values=alone.past_key_values, use_cache=True)
        assert relative(second.logits[row], alone.logits[0]) < 1e-5
        alone = model(last[row : row + 1], past_key_values=alone.past_key_values, use_cache=True)
        assert relative(third.logits[row], alone.logits[0]) < 1e-5
        assert state_difference(third.past_key_values[row], alone.past_key_values) < 1e-5


@settings(max_examples=25, deadline=None)
@given(
    documents=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    before=st.sampled_from([0, 0, 3, 8, 21]),
    name=NAMES,
)
def test_packed_documents_equal_each_alone(documents: list[int], before: int, name: str) -> None:
    model, length = MODELS[name].train(), sum(documents)
    rows = [documents, torch.roll(torch.tensor(documents), 1).tolist()]  # the second row is cut elsewhere
    x, y, prefix = text(2, length), tokens(2, length), text(2, before)
    ids = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows])

    def earlier() -> GeckoState | None:
        return model(prefix, use_cache=True).past_key_values if before else None

    packed = model(x, shift_labels=y, segment_ids=ids, past_key_values=earlier(), use_cache=True)
    packed.loss.backward()
    actual = gradients(model)
    state, loss = earlier(), torch.tensor(0.0)
    for row, sizes in enumerate(rows):
        at = 0
        for size in sizes:
            span = (slice(row, row + 1), slice(at, at + size))
            memory = state[row] if state is not None and at == 0 else None
            out = model(
                x[span], shift_labels=y[span], num_items_in_batch=y.numel(), past_key_values=memory, use_cache=True
            )
            assert relative(packed.logits[span], out.logits) < 1e-5
            loss, at = loss + out.loss, at + size
        assert state_difference(packed.past_key_values[row], out.past_key_values) < 1e-5
    loss.backward()
    assert gradient_difference(actual, gradients(model)) < 1e-4


@torch.no_grad()
def test_segments_hide_what_was_before_and_chunks_go_on() -> None:
    model, x = MODELS["segments"].eval(), torch.randint(2, VOCABULARY, (1, 50))
    x[0, 19] = BOS
    whole = model(x).logits
    assert relative(whole[:, 19:], model(torch.cat([x[:, :19].flip(1), x[:, 19:]], 1)).logits[:, 19:]) < 1e-6
    assert relative(whole[:, 19:27], model(x[:, 19:27]).logits) < 1e-5  # one chunk's worth of window
    alone = model(x[:, 19:]).logits
    assert relative(whole[:, 19:], alone) > 1e-3  # its chunks begin elsewhere
    packed = model(x, segment_ids=(torch.arange(50) >= 19).long()[None]).logits
    assert relative(packed[:, 19:], alone) < 1e-5


@torch.no_grad()
def test_size_is_constant() -> None:
    model, state, sizes = MODELS["plain"].eval(), None, {}
    for _ in range(14):
        state = model(tokens(2, 4), past_key_values=state, use_cache=True).past_key_values
        sizes.setdefault(min(int(state.position[0]) // 8, 1) * 8 + int(state.open_tokens[0]), set()).add(state.nbytes)
    assert sizes.keys() == {4, 8, 12} and all(len(seen) == 1 for seen in sizes.values())
    per_layer = GeckoState.layer_bytes(state.dimensions, int(state.open_tokens[0]))
    others = sum(state.state_dict()[f"final_norm.{name}"].nbytes for name in ("count", "mean", "var"))
    assert state.nbytes == 2 * (2 * per_layer) + others + state.position.nbytes


@torch.no_grad()
def state_at(model: GeckoForCausalLM, *lengths: int) -> GeckoState:
    longest = max(lengths)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return model(text(len(lengths), longest), attention_mask=mask.long(), use_cache=True).past_key_values


@pytest.mark.parametrize("name", ["plain", "segments"])
@torch.no_grad()
def test_index_repeat_concatenate(name: str) -> None:
    model = MODELS[name].eval()
    state, x = state_at(model, 29, 3, 16), text(1, 20)
    alone = [model(x, past_key_values=state[row], use_cache=True).logits for row in range(3)]

    def check(other: GeckoState, rows: list[int]) -> None:
        assert other.batch_size == len(rows)
        logits = model(x.expand(len(rows), -1), past_key_values=other).logits
        for got, row in zip(logits, rows, strict=True):
            assert relative(got, alone[row][0]) < 1e-5

    check(state[[2, 0]], [2, 0])
    check(state[torch.tensor([True, False, True])], [0, 2])
    check(state[-2:], [1, 2])
    check(state.repeat(2), [0, 0, 1, 1, 2, 2])
    check(GeckoState.concatenate([state[1], state, state[0]]), [1, 0, 1, 2, 0])
    check(state.to("cpu", torch.float32), [0, 1, 2])


@pytest.mark.parametrize("name", ["plain", "segments"])
@torch.no_grad()
def test_reset_rows_start_afresh(name: str) -> None:
    model = MODELS[name].eval()
    state, x = state_at(model, 29, 37), text(2, 30)
    out = model(x, past_key_values=state.reset(torch.tensor([False, True])), use_cache=True)
    assert relative(out.logits[0], model(x[:1], past_key_values=state[0]).logits[0]) < 1e-5
    assert relative(out.logits[1], model(x[1:]).logits[0]) < 1e-5
    assert state.position.tolist() == [29, 37]


def test_detach_cuts_gradients() -> None:
    state = MODELS["plain"](tokens(1, 30), use_cache=True).past_key_values
    assert state.layers[0].chunk.memory.requires_grad
    assert not any(t.requires_grad for t in state.detach().state_dict().values())


@pytest.mark.parametrize("name", ["plain", "segments"])
@torch.no_grad()
def test_save_and_load(name: str, tmp_path: Path) -> None:
    model = MODELS[name].eval()
    state = state_at(model, 29, 3)
    path = tmp_path / "context.safetensors"
    state.save(path, {"note": "chapter 1"})
    loaded = GeckoState.load(path, model.config)
    x = text(2, 19)
    assert torch.equal(model(x, past_key_values=loaded).logits, model(x, past_key_values=state).logits)
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match=r"chunk_size 8 .the model has 16"):
        GeckoState.load(path, tiny_gecko(chunk_size=16).config)
    with pytest.raises(ValueError, match="type 'gecko', not 'megalodon'"):
        MegalodonState.load(path)
    with pytest.raises(ValueError, match="past_key_values is a GeckoState"):
        tiny_model()(x, past_key_values=state)


@torch.no_grad()
def test_long_texts_go_through_a_layer_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for model in MODELS.values():
        x = text(2, 70)
        whole = model.eval()(x, use_cache=True)
        monkeypatch.setattr(modeling, "READ_AT_ONCE", 16)
        pieces = model(x, use_cache=True)
        monkeypatch.undo()
        assert relative(pieces.logits, whole.logits) < 1e-5
        assert state_difference(pieces.past_key_values, whole.past_key_values) < 1e-5


@torch.no_grad()
def test_bfloat16_keeps_what_must_be_wide() -> None:
    model, x = tiny_gecko().to(torch.bfloat16).eval(), tokens(1, 40)
    exact = tiny_gecko()(x).logits
    out = model(x, use_cache=True)
    assert ((out.logits - exact).square().mean().sqrt() / exact.std()) < 3e-2
    kinds = {name.rsplit(".", 1)[-1]: tensor.dtype for name, tensor in out.past_key_values.state_dict().items()}
    assert kinds["keys"] == kinds["values"] == torch.bfloat16
    assert kinds["memory"] == kinds["log_mass"] == kinds["cema"] == torch.float32
    assert kinds["mean"] == kinds["var"] == torch.float64


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm_num_groups": 32}, "norm_num_groups=32"),
        ({"layernorm_num_groups": 5}, "layernorm_num_groups=5"),
        ({"norm_beta1": 1.0}, "norm_beta1=1.0"),
        ({"num_rope_heads": 3}, "num_rope_heads=3"),
        ({"multi_segments": True}, "multi_segments=True needs bos_token_id"),
        ({"multi_segments": True, "bos_token_id": -1}, "bos_token_id=-1.*must be a token"),
        ({"multi_segments": True, "bos_token_id": 9999}, "bos_token_id=9999.*must be a token"),
        ({"norm_prior_count": 2}, "norm_prior_count=2: a gecko config has no such field"),
        ({"z_dim": 6}, "z_dim / num_heads = 3"),
    ],
)
def test_bad_configs_name_the_field(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_gecko(**fields)


def test_segments_need_tokens_and_a_bos_id() -> None:
    model = MODELS["segments"]
    with pytest.raises(ValueError, match="multi_segments"):
        model(inputs_embeds=torch.zeros(1, 3, 32))
    config = tiny_gecko().config
    config.multi_segments = True
    with pytest.raises(ValueError, match="bos_token_id"):
        GeckoForCausalLM(config)(tokens(1, 3))


def test_a_config_of_the_other_architecture_is_refused() -> None:
    for config, model in ((MegalodonConfig(), GeckoForCausalLM), (GeckoConfig(), MegalodonForCausalLM)):
        with pytest.raises(ValueError, match=f"config is a {type(config).__name__}: {model.__name__} needs"):
            model(config)


@torch.no_grad()
def test_a_loaded_state_of_float64_goes_on_with_segments(tmp_path: Path) -> None:
    model, x = segmented_gecko().double().eval(), text(3, 30)
    state = model(x[:, :11], use_cache=True).past_key_values
    state.save(tmp_path / "state")
    loaded = GeckoState.load(tmp_path / "state", model.config)
    addresses = [layer.cema.data_ptr() for layer in loaded.layers]
    assert all(address % 16 == 0 for address in addresses)  # others end the process
    logits = model(x[:, 11:], past_key_values=loaded).logits
    assert relative(logits, model(x).logits[:, 11:]) < 1e-6


def test_weights_at_any_address_make_complex_numbers() -> None:
    """As a file that is mapped into memory gives them: float64 at a multiple of 8 bytes that is none of 16."""
    cema = tiny_gecko().double().model.layers[0].cema
    expected = [x.detach().clone() for x in cema.coefficients()]
    room = torch.empty(cema.gamma.numel() + 1, dtype=torch.float64)
    cema.gamma.data = room[1:].view_as(cema.gamma).copy_(cema.gamma.data)
    assert cema.gamma.data_ptr() % 16 == 8
    found = cema.coefficients()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert found[2].data_ptr() % 16 == 0
