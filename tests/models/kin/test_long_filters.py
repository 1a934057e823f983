"""Hyena, the gated convolutions and H3 against what the recall study's code computed, and what a filter's end means."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kin_cases import check_mixer, golden, relative, tokens

from megalodon import KinConfig, KinForCausalLM
from megalodon.convert import mixer_from_reference
from megalodon.models.kin.mixers.base_conv import REFERENCE_NAMES as BASE_CONV_NAMES
from megalodon.models.kin.mixers.h3 import REFERENCE_NAMES
from megalodon.models.kin.mixers.hyena import reference_names
from megalodon.ops import layout_of


@pytest.mark.parametrize("case", ["base", "rich"])
def test_golden_hyena(shared: Path, case: str) -> None:
    vectors = golden(shared, "hyena", case)
    mixer = mixer_from_reference("hyena", vectors.config, vectors.named("param."))
    assert relative(mixer.filter(vectors.tensors["kernel"].shape[1]), vectors.tensors["kernel"]) < 1e-5
    check_mixer(mixer, vectors, reference_names(vectors.config.get("num_inner_mlps", 2)))


@pytest.mark.parametrize("case", ["short", "implicit", "explicit", "act"])
def test_golden_base_conv(shared: Path, case: str) -> None:
    vectors = golden(shared, "zoology_mixers", f"base_conv_{case}")
    mixer = mixer_from_reference("base_conv", vectors.config, vectors.named("param."))
    check_mixer(mixer, vectors, {ours: theirs for theirs, ours in BASE_CONV_NAMES.items()})


def test_golden_h3(shared: Path) -> None:
    vectors = golden(shared, "zoology_mixers", "h3")
    mixer = mixer_from_reference("h3", vectors.config, vectors.named("param."))
    shift = vectors.tensors["shift_kernel"]
    assert relative(mixer.shift.kernel(), shift[:, :8]) < 1e-6 and not shift[:, 8:].any()
    decay, read = mixer.state_space.recurrence()
    powers = decay[..., None] ** torch.arange(16)
    assert relative((read[..., None] * powers).sum(1).real, vectors.tensors["diag_kernel"]) < 1e-5
    check_mixer(mixer, vectors, {ours: theirs for theirs, ours in REFERENCE_NAMES.items()})


LONG = {"hyena": {}, "base_conv": {"kernel_size": -1}}


@pytest.mark.parametrize("name", sorted(LONG))
def test_no_document_passes_the_end_of_the_filter(name: str) -> None:
    parameters = {name: {**LONG[name], "max_length": 16}}
    config = KinConfig(mixers=name, num_layers=1, model_dim=8, num_heads=1, vocab_size=97, mixer_parameters=parameters)
    model = KinForCausalLM(config).eval()
    state = model(tokens(1, 10), use_cache=True).past_key_values
    assert config.state_kind == "growing"
    model(tokens(1, 6), past_key_values=state)
    with pytest.raises(ValueError, match=f"{name}: max_length=16, but a document has 17 tokens"):
        model(tokens(1, 7), past_key_values=state)
    ids = torch.arange(40)[None] // 16
    model(tokens(1, 40), segment_ids=ids)
    with pytest.raises(ValueError, match="max_length=16"):
        model(tokens(1, 40))


@pytest.mark.parametrize("name", sorted(LONG))
@torch.no_grad()
def test_a_kept_kernel_follows_its_parameters(name: str) -> None:
    parameters = {name: LONG[name]}
    config = KinConfig(mixers=name, num_layers=1, model_dim=8, num_heads=1, vocab_size=97, mixer_parameters=parameters)
    mixer, other = (KinForCausalLM(config).eval().model.layers[0].mixer for _ in range(2))
    x = torch.randn(1, 12, 8)
    layout = layout_of(1, 12, x.device)
    assert torch.equal(mixer(x, None, layout)[0], mixer(x, None, layout)[0])
    for parameter, new in zip(mixer.parameters(), other.parameters(), strict=True):
        parameter.data.copy_(new.data)
    assert torch.equal(mixer(x, None, layout)[0], other(x, None, layout)[0])


@pytest.mark.parametrize("implicit", [True, False])
@torch.no_grad()
def test_long_gated_convolutions_in_pieces_equal_the_whole(implicit: bool) -> None:
    parameters = {"base_conv": {"kernel_size": -1, "implicit": implicit, "max_length": 300}}
    config = KinConfig(
        mixers="base_conv", num_layers=2, model_dim=8, num_heads=1, vocab_size=97, mixer_parameters=parameters
    )
    model, x = KinForCausalLM(config).eval(), tokens(3, 200)
    whole, state, logits = model(x).logits, None, []
    for piece in x.split([1, 67, 2, 100, 30], 1):
        out = model(piece, past_key_values=state, use_cache=True)
        state = out.past_key_values
        logits.append(out.logits)
    assert relative(torch.cat(logits, 1), whole) < 1e-5
