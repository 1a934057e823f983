"""The compiled step of single tokens of kin models: the long way's numbers, the same bits alone and among others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kin_cases import relative

from megalodon import KinConfig, KinForCausalLM
from megalodon.models.kin.state import KinState
from megalodon.ops import compiled

pytestmark = pytest.mark.skipif(compiled.missing() is not None, reason=f"no kernels here: {compiled.missing()}")

PHI = {"norm": "layer", "parallel": True, "feed_forward": "gelu", "head_bias": True, "num_key_value_heads": 4}
TURNED = {"rope_frequencies": [0.9, 0.1, 0.01], "rope_amplitude": 1.2}
CASES: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "everything": (["attention"] * 2, {}),
    "windows": ([{"name": "sliding_attention", "window": w} for w in (1, 16)], {"rope_base": None}),
    "chunks": ([{"name": "window_memory", "chunk_size": 5, "feature_dim": 11}, {"name": "window_memory"}], {}),
    "chunks with what Phi has": (
        [{"name": "window_memory", "chunk_size": 4, "bias": True, "out_bias": True, "head_norm": "layer"}] * 2,
        PHI | TURNED,
    ),
    "lolcats": ([{"name": "lolcats", "window": 6}] * 2, {}),
    "lolcats with what Qwen has": (
        [{"name": "lolcats", "window": 7, "affine": True, "feature_dim": 5, "bias": True, "head_norm": "rms"}] * 2,
        {"share_emb": True, "num_key_value_heads": 1, **TURNED},
    ),
    "hedgehog": (["hedgehog", {"name": "hedgehog", "feature_dim": 3}], {}),
    "retention": (["retention", {"name": "retention", "decay": "none", "bias": True}], {}),
    "retention without groups": (["retention"] * 2, {"num_key_value_heads": 4, "rope_base": None}),
    "a hybrid": (["attention", {"name": "window_memory", "chunk_size": 8}], {}),
}


def made(case: str) -> KinForCausalLM:
    """In evaluation mode, every parameter away from where it begins."""
    mixers, fields = CASES[case]
    sizes = {"vocab_size": 61, "num_layers": 2, "model_dim": 32, "num_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(5)
    model = KinForCausalLM(KinConfig(mixers=mixers, **{**sizes, "ffn_hidden_dim": 48, **fields}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


def texts(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(rows))


def decode(model: KinForCausalLM, x: torch.Tensor, read: int) -> tuple[torch.Tensor, KinState]:
    """Logits and state of x [B, L], of which the first `read` tokens are read at once and the rest one by one."""
    state, logits = model(x[:, :read], use_cache=True).past_key_values, []
    for token in x[:, read:].split(1, dim=1):
        assert model.model.single_token(torch.zeros(len(x), 1, 32, dtype=model.dtype), state) is not None
        out = model(token, past_key_values=state, use_cache=True)
        state = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, 1), state


def differences(one: KinState, other: KinState) -> float:
    mine, theirs = one.state_dict(), other.state_dict()
    assert {name: x.shape for name, x in mine.items()} == {name: x.shape for name, x in theirs.items()}
    return max((relative(mine[name].double(), x.double()) for name, x in theirs.items() if x.numel()), default=0.0)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_single_tokens_equal_the_whole(case: str) -> None:
    model, x = made(case), texts(3, 45)
    whole = model(x, use_cache=True)
    logits, state = decode(model, x, 3)
    assert relative(logits, whole.logits[:, 3:]) < 2e-5
    assert differences(state, whole.past_key_values) < 2e-5
    again = model(x, past_key_values=state).logits
    assert relative(again, model(x, past_key_values=whole.past_key_values).logits) < 2e-5


@pytest.mark.parametrize("case", ["a hybrid", "lolcats"])
@torch.no_grad()
def test_a_state_is_a_value_and_a_row_its_own(case: str) -> None:
    """What was remembered stays, forks do not meet, and a row has the same bits alone and among others."""
    model, x = made(case), texts(4, 24)
    state = decode(model, x, 20)[1]
    before = {name: tensor.clone() for name, tensor in state.state_dict().items()}
    one = model(x[:, :1], past_key_values=state, use_cache=True)
    model(x[:, 1:2], past_key_values=state, use_cache=True)
    again = model(x[:, :1], past_key_values=state, use_cache=True)
    assert torch.equal(one.logits, again.logits)
    for name, tensor in one.past_key_values.state_dict().items():
        assert torch.equal(tensor, again.past_key_values.state_dict()[name])
    assert all(torch.equal(before[name], tensor) for name, tensor in state.state_dict().items())
    alone = model.model(x[2:3, :1], past_key_values=state[2], use_cache=True)
    assert torch.equal(model.model(x[:, :1], past_key_values=state).last_hidden_state[2:3], alone.last_hidden_state)


@torch.no_grad()
def test_rows_at_different_places() -> None:
    """Windows and sums need not stand alike; chunks and what keeps all must, or take the long way."""
    zero = torch.zeros(2, 1, 32)
    for case, goes in (("lolcats", True), ("a hybrid", False)):
        model, x = made(case), texts(2, 30)
        states = [model(x[:1, :4], use_cache=True).past_key_values, model(x[1:, :21], use_cache=True).past_key_values]
        both = KinState.concatenate(states)
        assert (model.model.single_token(zero, both) is not None) == goes
        out = model(x[:, -1:], past_key_values=both).logits
        wanted = [model(x[i : i + 1, -1:], past_key_values=states[i]).logits for i in range(2)]
        assert relative(out, torch.cat(wanted)) < 2e-5


@torch.no_grad()
def test_changed_weights_are_seen() -> None:
    model, x = made("chunks"), texts(1, 20)
    decode(model, x, 10)
    for parameter in model.parameters():
        parameter.mul_(1.1)
    logits, _ = decode(model, x, 10)
    assert relative(logits, model(x).logits[:, 10:]) < 2e-5


@torch.no_grad()
def test_what_the_step_cannot_do_goes_the_long_way() -> None:
    x, zero = texts(2, 9), torch.zeros(2, 1, 32)
    hooked = made("lolcats")
    hooked.model.layers[0].mixer.register_forward_hook(lambda *_: None)
    other = KinForCausalLM(KinConfig(vocab_size=61, num_layers=1, model_dim=32, num_heads=4, mixers="gla")).eval()
    for model in (hooked, other, made("lolcats").train(), made("lolcats").double()):
        state = model(x, use_cache=True).past_key_values
        assert model.model.single_token(zero.to(model.dtype), state) is None


@pytest.mark.parametrize("case", ["chunks", "lolcats"])
@torch.no_grad()
def test_bfloat16_follows_float32(case: str) -> None:
    model, x = made(case), texts(2, 40)
    exact, _ = decode(model, x, 5)
    low, _ = decode(made(case).to(torch.bfloat16), x, 5)
    assert ((low - exact).square().mean().sqrt() / exact.std()) < 4e-2
