"""The compiled step of single tokens: the long way's numbers, and the same bits alone and among others."""

from __future__ import annotations

import pytest
import torch
from gecko_cases import state_difference, tiny_gecko
from model_cases import relative, tokens

from megalodon import GeckoForCausalLM, GeckoState
from megalodon.models.gecko import token_step
from megalodon.ops import compiled

KINDS = {
    "plain": {},
    "two hops": {"two_hop_residual": True, "rescale_nffn": True, "num_rope_heads": 1},
    "no rotation": {"swiglu": False, "num_rope_heads": 0, "norm_affine": False},
}
pytestmark = pytest.mark.skipif(compiled.missing() is not None, reason=f"no kernels here: {compiled.missing()}")


def decode(model: GeckoForCausalLM, x: torch.Tensor, read: int) -> tuple[torch.Tensor, GeckoState]:
    """Logits and state of x [B, L], of which the first `read` tokens are read at once and the rest one by one."""
    state, logits = model(x[:, :read], use_cache=True).past_key_values, []
    for token in x[:, read:].split(1, dim=1):
        assert model.model.single_token(torch.zeros(len(x), 1, 32, dtype=model.dtype), state) is not None
        out = model(token, past_key_values=state, use_cache=True)
        state = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, 1), state


@pytest.mark.parametrize("kind", sorted(KINDS))
@torch.no_grad()
def test_single_tokens_equal_the_whole(kind: str) -> None:
    model, x = tiny_gecko(**KINDS[kind]).eval(), tokens(3, 45)
    whole = model(x, use_cache=True)
    logits, state = decode(model, x, 3)
    assert relative(logits, whole.logits[:, 3:]) < 1e-5
    assert state_difference(state, whole.past_key_values) < 1e-5
    again = model(x, past_key_values=state).logits
    assert relative(again, model(x, past_key_values=whole.past_key_values).logits) < 1e-5


@torch.no_grad()
def test_a_row_has_the_same_bits_alone_and_among_others() -> None:
    model, x = tiny_gecko().eval(), tokens(5, 30)
    _, state = decode(model, x, 6)
    for row in range(5):
        start = model(x[:, :6], use_cache=True).past_key_values[row]
        for t in range(6, 30):
            out = model.model(x[row : row + 1, t : t + 1], past_key_values=start, use_cache=True)
            start = out.past_key_values
        assert torch.equal(start.layers[-1].cema, state[row].layers[-1].cema)
        assert torch.equal(start.layers[-1].chunk.memory, state[row].layers[-1].chunk.memory)


@torch.no_grad()
def test_a_state_is_a_value() -> None:
    model, x = tiny_gecko().eval(), tokens(1, 24)
    state = model(x, use_cache=True).past_key_values
    before = {name: tensor.clone() for name, tensor in state.state_dict().items()}
    first = model(tokens(1, 1), past_key_values=state, use_cache=True)
    fork = model(x[:, :1], past_key_values=state, use_cache=True)
    again = model(x[:, :1], past_key_values=state, use_cache=True)
    assert torch.equal(fork.logits, again.logits)
    assert not torch.equal(first.past_key_values.layers[0].cema, fork.past_key_values.layers[0].cema)
    assert all(torch.equal(before[name], tensor) for name, tensor in state.state_dict().items())


@torch.no_grad()
def test_changed_weights_are_seen() -> None:
    model, x = tiny_gecko().eval(), tokens(1, 20)
    decode(model, x, 10)
    for parameter in model.parameters():
        parameter.mul_(1.1)
    logits, _ = decode(model, x, 10)
    assert relative(logits, model(x).logits[:, 10:]) < 1e-5


@torch.no_grad()
def test_what_the_step_cannot_do_goes_the_long_way() -> None:
    x, zero = tokens(2, 9), torch.zeros(2, 1, 32)
    hooked = tiny_gecko().eval()
    hooked.model.layers[0].cema.register_forward_hook(lambda *_: None)
    for model in (hooked, tiny_gecko(layernorm_num_groups=2).eval(), tiny_gecko().train()):
        state = model(x, use_cache=True).past_key_values
        assert model.model.single_token(zero, state) is None
    model = tiny_gecko().eval()
    state = model(x, use_cache=True).past_key_values
    uneven = GeckoState.concatenate([state[0], model(x[:1, :4], use_cache=True).past_key_values])
    assert model.model.single_token(zero, uneven) is None


@torch.no_grad()
def test_bfloat16_follows_float32() -> None:
    model, x = tiny_gecko().eval(), tokens(2, 40)
    exact, _ = decode(model, x, 5)
    low, state = decode(tiny_gecko().to(torch.bfloat16).eval(), x, 5)
    assert ((low - exact).square().mean().sqrt() / exact.std()) < 3e-2
    assert state.layers[0].chunk.before.keys.dtype == torch.bfloat16
    assert token_step.KERNEL == "gecko_step.blocks"
