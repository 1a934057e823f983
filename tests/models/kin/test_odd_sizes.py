"""Every mixer at sizes that nobody would choose, in float64: one head, odd heads, empty pieces, windows and chunks of
one, padding anywhere among packed documents that go on, with the gradients of all of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kin_cases import CAUSAL, VOCABULARY, relative, tokens

from megalodon import KinConfig, KinForCausalLM, KinModel
from megalodon.models.kin.mixers import MIXERS, mixer_class

SMALLEST: dict[str, dict[str, Any]] = {
    "attamba": {"chunk": 1, "leading": 0, "state_size": 1, "kernel_size": 1},
    "base_conv": {"kernel_size": -1, "implicit": False, "max_length": 300},
    "based": {"feature_dim": 1, "value_dim": 3},
    "feedforward_kernel": {"hidden_dim": 1, "feature_dim": 3, "gated": True},
    "gated_delta": {"key_dim": 3, "value_dim": 1, "conv_size": 1},
    "gecko": {"chunk_size": 1, "cema_ndim": 1, "z_dim": 6},
    "gla": {"expand_k": 1.0, "gate_rank": 1, "output_gate": False},
    "h3": {"state_size": 2},
    "hax": {"state_size": 1, "keys": 5, "bits": 1, "kernel_size": 1, "selection": ["lsh", "sink"]},
    "hedgehog": {"feature_dim": 3, "activation": "elu"},
    "hip": {"mask_size": 2, "query_block": 3, "key_block": 1, "window": 1, "sinks": 0},
    "hyena": {"max_length": 300, "kernel_size": 1, "filter_width": 1, "inner_layers": 0},
    "lizard": {"window": 1, "sinks": 0, "feature_dim": 3},
    "lolcats": {"window": 1, "feature_dim": 3, "affine": True},
    "mamba": {"state_size": 1, "kernel_size": 1, "expand": 3},
    "mamba2": {"state_size": 1, "head_dim": 1, "kernel_size": 1, "expand": 3},
    "megalodon": {"chunk_size": 1, "cema_ndim": 1, "z_dim": 6},
    "phi_mamba": {"state_size": 1, "kernel_size": 1, "activation": "silu"},
    "scout": {"segment": 1, "local_parameters": {"state_size": 1}},
    "sliding_attention": {"window": 1},
    "window_memory": {"chunk_size": 1, "feature_dim": 1},
}
SIZES: dict[str, Any] = {"num_layers": 2, "model_dim": 16, "num_heads": 2, "vocab_size": VOCABULARY}
every_mixer = pytest.mark.parametrize("name", sorted(CAUSAL))


def odd_model(name: str, heads: int, head_dim: int, smallest: bool) -> KinForCausalLM:
    """One layer; heads of a size that cannot turn are left as they are."""
    even = name in ("attamba", "megalodon", "gecko", "hip")  # without turns, hip's search meets ties of equal tokens
    width = heads * (head_dim + head_dim % 2 if even else head_dim)
    given = SMALLEST.get(name, {}) if smallest else CAUSAL[name]
    given = {key: value for key, value in given.items() if smallest or key not in ("groups", "head_dim", "z_dim")}
    given = {**given, "expand_k": 1.0} if name == "gla" else given
    torch.manual_seed(5)
    config = KinConfig(
        mixers=name,
        num_layers=1,
        model_dim=width,
        num_heads=heads,
        num_key_value_heads=1,
        vocab_size=VOCABULARY,
        ffn_hidden_dim=0,
        rope_base=10000.0 if width // heads % 2 == 0 else None,
        mixer_parameters={name: given} if given else None,
    )
    model = KinForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def taken(model: KinForCausalLM) -> dict[str, torch.Tensor]:
    found = {key: torch.zeros_like(p) if p.grad is None else p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    return found


def assert_same_gradients(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for key, gradient in expected.items():
        assert float((actual[key] - gradient).abs().max()) < 1e-8 * largest, key


@every_mixer
@pytest.mark.parametrize("smallest", [False, True])
@settings(max_examples=2)
@given(
    heads=st.sampled_from([1, 3]),
    head_dim=st.sampled_from([3, 5, 8]),
    pieces=st.lists(st.sampled_from([0, 1, 1, 2, 7, 19]), min_size=2, max_size=6),
    documents=st.lists(st.sampled_from([1, 2, 7, 20]), min_size=1, max_size=4),
    read=st.sampled_from([0, 1, 11]),
    holes=st.sampled_from([0, 5]),
)
def test_pieces_and_documents_at_odd_sizes(
    name: str, smallest: bool, heads: int, head_dim: int, pieces: list[int], documents: list[int], read: int, holes: int
) -> None:
    model = odd_model(name, heads, head_dim, smallest)
    pieces = [*pieces, 3]
    x, weights = tokens(2, sum(pieces)), torch.randn(2, sum(pieces), VOCABULARY, dtype=torch.float64)
    whole = model(x, use_cache=True).logits
    (whole * weights).sum().backward()
    expected, state, logits = taken(model), None, []
    for piece in x.split(pieces, 1):
        out = model(piece, past_key_values=state, use_cache=True)
        state = out.past_key_values
        logits.append(out.logits)
    assert relative(torch.cat(logits, 1), whole) < 1e-9
    (torch.cat(logits, 1) * weights).sum().backward()
    assert_same_gradients(taken(model), expected)

    length = sum(documents)
    x, before = tokens(2, length), tokens(2, read)
    weights = torch.randn(2, length, VOCABULARY, dtype=torch.float64)
    numbers = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents))
    state, logits = (model(before, use_cache=True).past_key_values if read else None), []
    for number, document in enumerate(x.split(documents, 1)):
        alone = model(document, past_key_values=state if number == 0 else None, use_cache=True)
        logits.append(alone.logits)
    (torch.cat(logits, 1) * weights).sum().backward()
    expected = taken(model)
    width = length + holes
    columns = torch.stack([torch.randperm(width)[:length].sort().values for _ in range(2)])
    mask = torch.zeros(2, width, dtype=torch.long).scatter(1, columns, 1)
    scattered = torch.zeros(2, width, dtype=torch.long).scatter(1, columns, x)
    ids = numbers[(mask.cumsum(1) - 1).clamp(min=0)]  # padding belongs to the document before it
    state = model(before, use_cache=True).past_key_values if read else None
    packed = model(scattered, attention_mask=mask, segment_ids=ids, past_key_values=state, use_cache=True)
    found = packed.logits.gather(1, columns[..., None].expand(-1, -1, VOCABULARY))
    assert relative(found, torch.cat(logits, 1)) < 1e-9
    (found * weights).sum().backward()
    assert_same_gradients(taken(model), expected)
    following = tokens(2, 4)
    after = model(following, past_key_values=packed.past_key_values).logits
    assert relative(after, model(following, past_key_values=alone.past_key_values).logits) < 1e-9


@every_mixer
@pytest.mark.parametrize("head_dim", [1, 3])
@torch.no_grad()
def test_odd_heads_turn_nowhere_unsaid(name: str, head_dim: int) -> None:
    sizes = {"num_layers": 1, "num_heads": 2, "model_dim": 2 * head_dim, "vocab_size": VOCABULARY}
    try:
        model = KinForCausalLM(KinConfig(mixers=name, **sizes)).eval()
    except ValueError as error:
        named = (f"head_dim={head_dim}: {name} turns heads in pairs", "attamba: heads of", "gla: expand_k")
        assert any(words in str(error) for words in named), error
        return
    assert torch.isfinite(model(tokens(1, 9)).logits).all()


@pytest.mark.parametrize("name", sorted(MIXERS))
@torch.no_grad()
def test_no_rows_and_no_tokens_are_read(name: str) -> None:
    two_way = not mixer_class(name).causal_mode
    model = KinModel(KinConfig(mixers=name, **SIZES, two_way=two_way)).eval()
    for rows, length in ((0, 6), (2, 0), (0, 0)):
        out = model(torch.zeros(rows, length, dtype=torch.long), use_cache=True)
        assert out.last_hidden_state.shape == (rows, length, 16)
        assert out.past_key_values.position.shape == (rows,)


@every_mixer
@torch.no_grad()
def test_a_row_of_padding_alone_reads_nothing(name: str) -> None:
    model = KinForCausalLM(KinConfig(mixers=name, **SIZES)).eval()
    x, mask = tokens(2, 6), torch.tensor([[1] * 6, [0] * 6])
    out = model(x, attention_mask=mask, use_cache=True)
    assert torch.isfinite(out.logits).all()
    assert relative(model(x[1:], past_key_values=out.past_key_values[1]).logits, model(x[1:]).logits) < 1e-5
