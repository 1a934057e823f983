"""The short way of a single token: the long way's numbers, weights as they are now, nothing bypassed unseen."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from model_cases import relative, tiny_model
from torch import Tensor

from megalodon import MegalodonForCausalLM, MegalodonState
from megalodon.models.megalodon import token_step
from megalodon.models.megalodon.token_step import TokenStep

CHUNK = 8
TOKENS = torch.randint(0, 50, (2, 3 * CHUNK), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """One entry for each token that went the short way."""
    calls: list[int] = []
    advance = TokenStep.advance

    def counted(self: TokenStep, x: Tensor, state: MegalodonState):
        calls.append(len(x))
        return advance(self, x, state)

    monkeypatch.setattr(TokenStep, "advance", counted)
    yield calls
    token_step._STEPS.clear()


def model_of(dtype: torch.dtype = torch.float64, **changes: object) -> MegalodonForCausalLM:
    model = tiny_model(chunk_size=CHUNK, vocab_size=50, **changes).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def step(model: MegalodonForCausalLM, start: int, state: MegalodonState):
    return model(TOKENS[:, start : start + 1], past_key_values=state, use_cache=True)


@torch.no_grad()
def read(model: MegalodonForCausalLM, length: int) -> MegalodonState:
    return model(TOKENS[:, :length], use_cache=True).past_key_values


@pytest.mark.parametrize(
    "changes",
    [{}, {"swiglu": True, "rescale_nffn": True, "scale_emb": True}, {"norm_prior_count": 3}, {"norm_affine": False}],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_single_tokens_give_what_the_whole_gives(changes, dtype, taken) -> None:
    model = model_of(dtype, **changes)
    with torch.no_grad():
        whole = model(TOKENS, use_cache=True)
    state, rows = read(model, 3), []
    for place in range(3, TOKENS.shape[1]):
        output = step(model, place, state)
        state = output.past_key_values
        rows.append(output.logits)
    assert taken == [2] * (TOKENS.shape[1] - 3)
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    assert relative(torch.cat(rows, 1), whole.logits[:, 3:]) < bound
    expected, actual = whole.past_key_values.state_dict(), state.state_dict()
    assert all(relative(actual[name], expected[name]) < bound for name in expected if expected[name].numel())


def test_a_state_is_not_changed_and_can_be_forked(taken) -> None:
    model = model_of()
    state = read(model, 5)
    before = state.clone().state_dict()
    first = step(model, 5, state)
    other = step(model, 9, state)
    assert len(taken) == 2 and not torch.equal(first.logits, other.logits)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.state_dict().items())
    assert torch.equal(step(model, 5, state).logits, first.logits)
    again = step(model, 6, first.past_key_values).logits
    step(model, 7, first.past_key_values)
    assert torch.equal(step(model, 6, first.past_key_values).logits, again)


@pytest.mark.parametrize(
    "name",
    ["layers.0.attention.r_proj.weight", "layers.0.cema.alpha", "layers.1.attention.qk_weight", "final_norm.bias"],
)
@pytest.mark.parametrize("way", ["in place", "another tensor", "data, then a prompt", "data, then a training step"])
def test_weights_count_as_they_are_now(name: str, way: str, taken) -> None:
    model = model_of()
    state = read(model, 5)
    old = step(model, 5, state).logits
    parameter = model.model.get_parameter(name)
    with torch.no_grad():
        match way:
            case "in place":
                parameter.add_(0.5)
            case "another tensor":
                parameter.data = parameter.data + 0.5
            case "data, then a prompt":
                parameter.data.add_(0.5)
                read(model, 2)
            case _:
                parameter.data.add_(0.5)
                with torch.enable_grad():
                    model(TOKENS, labels=TOKENS, use_cache=False)
    new = step(model, 5, state).logits
    token_step._STEPS.clear()
    assert torch.equal(step(model, 5, state).logits, new) and not torch.equal(new, old) and len(taken) == 3


def test_hooks_and_replaced_modules_are_called(taken) -> None:
    model = model_of()
    state = read(model, 5)
    expected = step(model, 5, state).logits
    seen: list[str] = []
    handle = model.model.layers[1].cema.register_forward_hook(lambda *_: seen.append("hook"))
    assert relative(step(model, 5, state).logits, expected) < 1e-12 and seen == ["hook"] and len(taken) == 1
    handle.remove()
    forward = model.model.layers[0].forward
    model.model.layers[0].forward = lambda *arguments: (seen.append("forward"), forward(*arguments))[1]
    assert relative(step(model, 5, state).logits, expected) < 1e-12 and seen[-1] == "forward" and len(taken) == 1


def test_a_layer_that_others_listen_to_or_replace_is_called(taken) -> None:
    model = model_of()
    state = read(model, 5)
    expected = step(model, 5, state).logits
    seen: list[str] = []  # these are called, and so the short way stays open
    handle = model.model.layers[1].feed_forward.down_proj.register_forward_hook(lambda *_: seen.append("hook"))
    assert relative(step(model, 5, state).logits, expected) < 1e-12 and seen == ["hook"] and len(taken) == 2
    handle.remove()

    class Adapted(torch.nn.Module):
        def __init__(self, base: torch.nn.Linear) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.base(x)

    attention = model.model.layers[0].attention
    attention.o_proj = Adapted(attention.o_proj)
    adapted = step(model, 5, state).logits
    assert relative(adapted, expected) > 1e-3
    with torch.no_grad():
        whole = model(TOKENS[:, :6]).logits[:, 5:]
    other = step(model, 5, read(model, 5)).logits
    assert relative(other, whole) < 1e-12

    attention.o_proj = attention.o_proj.base
    assert relative(step(model, 5, state).logits, expected) < 1e-12
    attention.h_proj = torch.nn.Linear(attention.h_proj.in_features, attention.h_proj.out_features).double()
    assert relative(step(model, 5, state).logits, expected) > 1e-3


def test_what_needs_the_long_way_takes_it(taken, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    state, one = read(model, 5), TOKENS[:, 5:6]
    with torch.no_grad():
        model(one, past_key_values=state, use_cache=True, output_hidden_states=True)
        model(one, past_key_values=state, use_cache=True, attention_mask=torch.tensor([[1], [0]]))
        model(one, past_key_values=read(model, 0), use_cache=True)
        uneven = MegalodonState.concatenate([read(model, 5)[0], read(model, 6)[1]])
        model(one, past_key_values=uneven, use_cache=True)
        monkeypatch.setenv("MEGALODON_BACKEND", "reference")
        model(one, past_key_values=state, use_cache=True)
        monkeypatch.delenv("MEGALODON_BACKEND")
    output = model(one, past_key_values=state, use_cache=True)
    assert output.logits.requires_grad and taken == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_head_counts_as_it_is_now(dtype: torch.dtype, taken) -> None:
    model = model_of(dtype)
    state, seen = read(model, 5), []
    old = step(model, 5, state).logits
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    bound = 1e-12 if dtype == torch.float64 else 0.02
    assert relative(step(model, 5, state).logits, 2 * old) < bound
    handle = model.lm_head.register_forward_hook(lambda *_: seen.append("hook"))
    assert relative(step(model, 5, state).logits, 2 * old) < bound and seen == ["hook"]
    handle.remove()
    with torch.no_grad():
        model.lm_head.weight.data.mul_(2)  # leaves no trace: known once a prompt has been read
        read(model, 2)
    assert relative(step(model, 5, state).logits, 4 * old) < bound
    model.lm_head = torch.nn.Linear(model.config.model_dim, 50, bias=True, dtype=dtype)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert relative(step(model, 5, state).logits, model.lm_head.bias.float().expand(2, 1, -1)) < bound
    assert len(taken) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_bits_of_a_row_do_not_depend_on_the_others(dtype: torch.dtype, taken) -> None:
    model = model_of(dtype)
    tokens = torch.randint(0, 50, (9, 3), generator=torch.Generator().manual_seed(1))
    state = read(model, 5)[[0] * 9]
    together = model(tokens[:, :1], past_key_values=state, use_cache=True)
    for row in (0, 3, 8):
        alone = model(tokens[row : row + 1, :1], past_key_values=state[row], use_cache=True)
        assert torch.equal(alone.logits[0], together.logits[row])
        mine, theirs = alone.past_key_values.state_dict(), together.past_key_values[row].state_dict()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert taken == [9, 1, 1, 1]


def test_a_model_that_decodes_holds_its_weights_once() -> None:
    pytest.importorskip("numba")
    model = model_of(torch.float32)
    fused = TokenStep(model.model).fused
    assert fused is not None
    weights = {layer.weight.data_ptr() for layer in token_step.linear_layers(model.model)}
    assert weights <= {tensor.data_ptr() for tensor in fused._tables._alive}
    step = TokenStep(model.model)
    assert all(product.weight is None for block in step.blocks for product in block.products)
