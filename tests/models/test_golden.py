"""The whole model against what the authors' implementation computed, and the published sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import relative
from safetensors import safe_open
from torch import Tensor

from megalodon import PRESETS, MegalodonConfig, MegalodonForCausalLM
from megalodon.convert import config_from_reference, state_dict_from_reference, state_dict_to_reference

OWN = Path(__file__).parent.parent / "golden"


def load(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["meta"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def model_of(meta: dict[str, Any], tensors: dict[str, Tensor]) -> MegalodonForCausalLM:
    config = config_from_reference(meta["config"])
    model = MegalodonForCausalLM(config)
    parameters = {name[6:]: value for name, value in tensors.items() if name.startswith("param.")}
    missing, unexpected = model.load_state_dict(state_dict_from_reference(parameters, config), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model


def check_full(path: Path) -> None:
    meta, tensors = load(path)
    model = model_of(meta, tensors)
    out = model(tensors["tokens"], shift_labels=tensors["targets"])
    assert relative(out.logits, tensors["logits"]) < 1e-5
    assert float(out.loss.detach()) == pytest.approx(float(tensors["token_loss"].mean()), rel=1e-5)
    out.loss.backward()
    ours = state_dict_to_reference({n: p.grad for n, p in model.named_parameters()}, model.config)
    expected = {name[5:]: value for name, value in tensors.items() if name.startswith("grad.")}
    assert expected
    for name, gradient in expected.items():
        assert relative(ours[name], gradient) < 1e-4, name


def check_stream(path: Path) -> None:
    meta, tensors = load(path)
    model = model_of(meta, tensors)
    state, logits = None, []
    with torch.no_grad():
        for piece in tensors["tokens"].split(meta["pieces"], dim=1):
            out = model(piece, past_key_values=state, use_cache=True)
            state = out.past_key_values
            logits.append(out.logits)
    assert relative(torch.cat(logits, 1), tensors["logits"]) < 1e-5
    ours = state.state_dict()
    pairs = {"norm.mean": "norm.mean", "norm.var": "norm.var", "cema": "cema.h", "keys": "attn.k", "values": "attn.v"}
    for layer in range(model.config.num_layers):
        assert torch.equal(tensors[f"state.{layer}.norm.count"], state.position)
        for mine, theirs in pairs.items():
            assert relative(ours[f"layers.{layer}.{mine}"], tensors[f"state.{layer}.{theirs}"]) < 1e-5
    for name in ("mean", "var"):
        assert relative(ours[f"final_norm.{name}"], tensors[f"state.final_norm.{name}"]) < 1e-5


def test_logits_and_gradients() -> None:
    check_full(OWN / "full_swiglu_tied.safetensors")


def test_stream() -> None:
    check_stream(OWN / "stream_swiglu_tied.safetensors")


@pytest.mark.parametrize("name", ["full_base", "full_short"])
def test_logits_and_gradients_of_the_other_vectors(name: str, shared: Path) -> None:
    check_full(shared / "golden" / f"{name}.safetensors")


def test_stream_of_the_other_vectors(shared: Path) -> None:
    check_stream(shared / "golden" / "stream_base.safetensors")


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("200m", 220_627_968),
        ("1.3b", 1_342_832_640),
        ("1.3b-pg19", 1_327_628_288),
        ("7.1b", 7_117_381_632),
        ("7.3b", 7_385_817_088),
        ("paper-7b", 7_385_817_088),
    ],
)
def test_presets_have_the_published_sizes(name: str, count: int) -> None:
    with torch.device("meta"):
        assert MegalodonForCausalLM(MegalodonConfig.from_preset(name)).num_parameters() == count
    assert len(PRESETS) == 6


def test_bfloat16_agrees_to_its_precision() -> None:
    meta, tensors = load(OWN / "full_swiglu_tied.safetensors")
    model = model_of(meta, tensors)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mixed = model(tensors["tokens"]).logits
    with torch.no_grad():
        low = model.to(torch.bfloat16)(tensors["tokens"]).logits
    assert mixed.dtype == low.dtype == torch.float32
    for logits in (mixed, low):
        error = (logits - tensors["logits"]).square().mean().sqrt() / tensors["logits"].std()
        assert 1e-4 < error < 3e-2
