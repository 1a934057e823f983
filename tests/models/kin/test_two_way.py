"""Encoders and cross attention: every token sees the whole of its document, or all of another sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kin_cases import relative

from megalodon import KinConfig, KinModel
from megalodon.models.kin.mixers import MIXERS, Mixer, mixer_class
from megalodon.ops import Layout, two_way_linear_attention, two_way_window_attention

TWO_WAY: dict[str, dict[str, Any]] = {
    "attention": {},
    "based": {"feature_dim": 4},
    "feedforward_kernel": {},
    "gla": {"gate_rank": 4},
    "hedgehog": {},
    "hydra": {"state_size": 4},
    "sliding_attention": {"window": 80},
}
CROSS = ("attention", "based", "feedforward_kernel", "hedgehog")


def encoder(name: str) -> KinModel:
    torch.manual_seed(3)
    config = KinConfig(
        mixers=name,
        num_layers=2,
        model_dim=32,
        num_heads=4,
        num_key_value_heads=4 if name == "hydra" else 2,
        vocab_size=97,
        two_way=True,
        mixer_parameters={name: TWO_WAY[name]} if TWO_WAY[name] else None,
    )
    model = KinModel(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def test_the_table_is_complete() -> None:
    assert {name for name in MIXERS if mixer_class(name).two_way_mode} == set(TWO_WAY)
    assert {name for name in MIXERS if mixer_class(name).cross is not Mixer.cross} == {*CROSS, "hip"}  # an attention


@pytest.mark.parametrize("name", TWO_WAY)
def test_every_token_sees_all_of_its_document(name: str) -> None:
    model, x = encoder(name), torch.randint(0, 97, (1, 12))
    embedded = model.embed_tokens(x).detach().requires_grad_()
    ids = torch.tensor([[0] * 5 + [1] * 7])
    out = model(inputs_embeds=embedded, segment_ids=ids).last_hidden_state
    for token in (0, 4, 5, 11):
        (gradient,) = torch.autograd.grad(out[0, token].sum(), embedded, retain_graph=True)
        assert torch.equal(gradient[0].abs().sum(-1) > 1e-12, ids[0] == ids[0, token])


class _Hidden(torch.nn.Module):
    def __init__(self, model: KinModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, use_cache=False).last_hidden_state


@torch.no_grad()
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", TWO_WAY)
def test_encoders_are_exported_at_any_length(name: str, strict: bool) -> None:
    model, anywhere = _Hidden(encoder(name)), ({1: torch.export.Dim("length", min=2, max=1 << 20)},)
    some = torch.randint(0, 97, (2, 21))
    program = torch.export.export(model, (some,), dynamic_shapes=anywhere, strict=strict).module()
    for length in (2, 40, 300):
        x = torch.randint(0, 97, (2, length))
        assert relative(program(x), model(x)) < 1e-12


@pytest.mark.parametrize("name", TWO_WAY)
@settings(max_examples=5)
@given(documents=st.lists(st.integers(1, 30), min_size=1, max_size=4), left=st.booleans())
@torch.no_grad()
def test_documents_and_padded_rows_are_alone(name: str, documents: list[int], left: bool) -> None:
    model, length = encoder(name), sum(documents)
    x = torch.randint(0, 97, (2, length))
    ids = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents)).expand(2, -1)
    packed = model(x, segment_ids=ids).last_hidden_state
    mask = torch.ones(2, length, dtype=torch.long)
    columns = slice(length - documents[0], length) if left else slice(0, documents[0])
    mask[0] = 0
    mask[0, columns] = 1
    padded = model(x, attention_mask=mask).last_hidden_state
    assert relative(padded[0, columns], model(x[:1, columns]).last_hidden_state[0]) < 1e-10
    for number, document in enumerate(x.split(documents, 1)):
        assert relative(packed[:, ids[0] == number], model(document).last_hidden_state) < 1e-10


@pytest.mark.parametrize("decay", ["none", "constant", "scalar", "vector"])
@pytest.mark.parametrize("normalise", [False, True])
def test_both_sides_equal_the_definition(decay: str, normalise: bool) -> None:
    q, k, v = (torch.randn(2, 75, heads, 3, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    shapes = {"none": None, "constant": (2,), "scalar": (2, 75, 2), "vector": (2, 75, 2, 6)}
    shape, inputs = shapes[decay], [q, k, v]
    if shape is not None:
        inputs.append((-torch.rand(shape, dtype=torch.float64)).requires_grad_())
    options = {"log_decay": inputs[3] if shape else None, "normalise": normalise, "feature_map": "softmax_both"}
    options["layout"] = Layout(2, 75, segment_ids=(torch.arange(75) > 40).long().expand(2, -1), lengths=[75, 60])
    results = []
    for backend in ("reference", "blocked"):
        out = two_way_linear_attention(q, k, v, backend=backend, **options)[1:, :60]
        upstream = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        results.append([out, *torch.autograd.grad((out * upstream).sum(), inputs)])
    for actual, expected in zip(*results, strict=True):
        assert relative(actual, expected) < 1e-9


def test_both_sides_of_a_window_equal_softmax() -> None:
    q, k, v = (torch.randn(1, 50, heads, 3, dtype=torch.float64) for heads in (4, 2, 2))
    lag = torch.arange(50)[:, None] - torch.arange(50)
    keys, values = (x.repeat_interleave(2, 2).transpose(1, 2) for x in (k, v))
    scores = (q.transpose(1, 2) @ keys.mT).masked_fill(lag.abs() >= 6, -torch.inf)
    expected = (scores.softmax(-1) @ values).transpose(1, 2)
    assert relative(two_way_window_attention(q, k, v, 6), expected) < 1e-12


@pytest.mark.parametrize("name", CROSS)
@torch.no_grad()
def test_cross_attention_reads_all_of_the_source(name: str) -> None:
    """Noncausal and causal cross attention: the source is seen whole, and of the target nothing but the token."""
    mixer = encoder(name).layers[0].mixer
    x, source = torch.randn(2, 7, 32, dtype=torch.float64), torch.randn(2, 9, 32, dtype=torch.float64)
    out = mixer.cross(x, source)
    assert relative(mixer.cross(x, source.flip(1)), out) < 1e-12
    assert relative(mixer.cross(x[:, 3:4], source), out[:, 3:4]) < 1e-12
    changed = source.clone()
    changed[:, 6:] += 1
    assert relative(mixer.cross(x, changed), out) > 1e-6
    padding = (torch.arange(9) >= 6).expand(2, -1)
    assert relative(mixer.cross(x, changed, padding), mixer.cross(x, source[:, :6])) < 1e-12


def test_what_has_no_such_form_says_so() -> None:
    with pytest.raises(ValueError, match="retention has no form that sees both sides"):
        KinConfig(mixers="retention", num_layers=1, model_dim=32, num_heads=4, vocab_size=97, two_way=True)
    with pytest.raises(ValueError, match="GLA has no form that reads another sequence"):
        encoder("gla").layers[0].mixer.cross(torch.zeros(1, 2, 32), torch.zeros(1, 2, 32))
    model = encoder("based")
    state = model(torch.zeros(1, 3, dtype=torch.long), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cannot be read in pieces"):
        model(torch.zeros(1, 3, dtype=torch.long), past_key_values=state)
