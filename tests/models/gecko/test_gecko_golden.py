"""Gecko against what its authors' implementation computed in float64, stored in float32, and its published size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from megalodon import GeckoConfig, GeckoForCausalLM, MegalodonConfig, MegalodonForCausalLM, ops
from megalodon.convert import (
    config_from_reference,
    config_to_reference,
    state_dict_from_reference,
    state_dict_to_reference,
)

STORED = 3e-7
"""What rounding to float32 leaves of float64 values, relative to the largest."""

LIMITS = {torch.float64: (STORED, 1e-6), torch.float32: (1e-5, 1e-4)}
both = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


def relative(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().double(), expected.double()
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def load(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(folder / "golden" / "gecko" / f"{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()["meta"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def model_of(meta: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype) -> GeckoForCausalLM:
    config = config_from_reference(meta["config"], architecture="gecko")
    config.bos_token_id = meta["bos_id"]
    config.multi_segments = meta["multi_segments"]
    model = GeckoForCausalLM(config).to(dtype)
    parameters = {name[6:]: value.to(dtype) for name, value in tensors.items() if name.startswith("param.")}
    missing, unexpected = model.load_state_dict(state_dict_from_reference(parameters, config), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model


@both
@pytest.mark.parametrize("name", ["full_base", "full_twohop_rope1", "full_segments", "full_swiglu_fast"])
def test_logits_losses_and_gradients(name: str, dtype: torch.dtype, shared: Path) -> None:
    meta, tensors = load(shared, name)
    model, (forward, backward) = model_of(meta, tensors, dtype), LIMITS[dtype]
    hidden = model.model(tensors["tokens"]).last_hidden_state
    logits = model.lm_head(hidden)
    assert relative(logits, tensors["logits"]) < forward
    losses = torch.nn.functional.cross_entropy(logits.mT, tensors["targets"], reduction="none")
    assert relative(losses, tensors["token_loss"]) < forward
    losses.mean().backward()
    ours = state_dict_to_reference({n: p.grad for n, p in model.named_parameters()}, model.config)
    expected = {key[5:]: value for key, value in tensors.items() if key.startswith("grad.")}
    assert expected
    for key, gradient in expected.items():
        assert relative(ours[key], gradient) < backward, key


@pytest.mark.parametrize("name", ["full_base", "full_segments"])
def test_the_model_itself_gives_them_too(name: str, shared: Path) -> None:
    meta, tensors = load(shared, name)
    out = model_of(meta, tensors, torch.float32)(tensors["tokens"], shift_labels=tensors["targets"])
    assert relative(out.logits, tensors["logits"]) < 1e-5
    assert float(out.loss.detach()) == pytest.approx(float(tensors["token_loss"].mean()), rel=1e-5)


@both
@pytest.mark.parametrize("name", ["stream_base", "stream_tokens", "stream_segments"])
def test_stream(name: str, dtype: torch.dtype, shared: Path) -> None:
    meta, tensors = load(shared, name)
    model, limit = model_of(meta, tensors, dtype).eval(), LIMITS[dtype][0]
    state, logits = None, []
    with torch.no_grad():
        for piece in tensors["tokens"].split(meta["pieces"], dim=1):
            out = model(piece, past_key_values=state, use_cache=True)
            state = out.past_key_values
            logits.append(out.logits)
    assert relative(torch.cat(logits, 1), tensors["logits"]) < limit + 1e-6  # logits are float32
    assert state is not None
    config, ours = model.config, state.state_dict()
    length, size = int(state.position[0]), config.chunk_size
    for layer in range(config.num_layers):
        mine, theirs = f"layers.{layer}.", f"state.{layer}."
        assert torch.equal(ours[mine + "norm.count"], tensors[theirs + "norm.count"])
        pairs = {"norm.mean": "norm.mean", "norm.var": "norm.var", "cema": "cema.h", "memory": "memory.M"}
        for one, other in {**pairs, "log_mass": "memory.log_norm"}.items():
            assert relative(ours[mine + one], tensors[theirs + other]) < limit, one
        keys, values = (torch.cat([ours[f"{mine}before.{x}"], ours[mine + x]], 1) for x in ("keys", "values"))
        rotated, addresses = keys.split(config.head_dim, dim=-1)
        assert relative(addresses, tensors[theirs + "memory.k"]) < limit
        assert relative(values, tensors[theirs + "attn.v"]) < limit
        assert relative(from_the_streams_start(rotated, length, size, config), tensors[theirs + "attn.k"]) < 1e-5
    for name in ("mean", "var"):
        assert relative(ours[f"final_norm.{name}"], tensors[f"state.final_norm.{name}"]) < limit


def from_the_streams_start(keys: Tensor, length: int, size: int, config: GeckoConfig) -> Tensor:
    """Keys [B, n, H, d], turned by their place in the chunk, turned on by where their chunk begins."""
    heads = config.rotated_heads
    position = torch.arange(length - keys.shape[1], length)
    turns = ops.rotations(position - position % size, config.head_dim, config.rope_base)
    return torch.cat([ops.rotate(keys[:, :, :heads], turns), keys[:, :, heads:]], dim=2) if heads else keys


def test_the_preset_has_the_published_size() -> None:
    with torch.device("meta"):
        assert GeckoForCausalLM(GeckoConfig.from_preset("gecko-7b")).num_parameters() == 7_385_817_088


@pytest.mark.parametrize("name", ["full_base", "full_twohop_rope1", "full_segments"])
def test_to_the_reference_and_back(name: str, shared: Path) -> None:
    meta, tensors = load(shared, name)
    model = model_of(meta, tensors, torch.float32)
    theirs = state_dict_to_reference(model.state_dict(), model.config)
    parameters = {key[6:]: value for key, value in tensors.items() if key.startswith("param.")}
    for key, value in parameters.items():
        assert torch.equal(theirs[key], value), key
    buffers = theirs.keys() - parameters.keys()
    norms = [f"layers.{i}.mega.timenorm." for i in range(model.config.num_layers)] + ["output.final_norm."]
    rotation = {"rope.freqs"} if model.config.rotated_heads else set()
    assert buffers == rotation | {n + f"prior_{k}" for n in norms for k in ("count", "mean", "var")}
    again = state_dict_from_reference(theirs, model.config)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in again.items())
    fields = config_to_reference(model.config)
    assert config_from_reference(fields, architecture="gecko").to_dict().keys() == model.config.to_dict().keys()
    assert fields == meta["config"], "every field that their config has, and no other"


def test_the_other_architectures_checkpoints_are_refused(shared: Path) -> None:
    meta, tensors = load(shared, "full_base")
    with pytest.raises(ValueError, match=r"'layernorm_num_groups'.*looks like a gecko config"):
        config_from_reference(meta["config"])
    with safe_open(shared / "golden" / "full_base.safetensors", "pt") as file:
        other = json.loads(file.metadata()["meta"])["config"]
    with pytest.raises(ValueError, match=r"'norm_num_groups'.*looks like a megalodon config"):
        config_from_reference(other, architecture="gecko")
    with pytest.raises(ValueError, match="architecture is 'geko'"):
        config_from_reference(other, architecture="geko")
    gecko = config_from_reference(meta["config"], architecture="gecko")
    names = MegalodonConfig().to_dict().keys() & gecko.to_dict().keys()
    megalodon = MegalodonConfig(**{n: getattr(gecko, n) for n in names if not n.startswith("_") and n != "model_type"})
    parameters = {key[6:]: value for key, value in tensors.items() if key.startswith("param.")}
    with pytest.raises(ValueError, match=r"mega.gamma has shape \[4, 16\]; the config gives it \[2, 16\]"):
        state_dict_from_reference({"layers.0.mega.gamma": parameters["layers.0.mega.gamma"]}, megalodon)
    with pytest.raises(ValueError, match="the config gives it"):
        state_dict_from_reference(parameters, megalodon)
    theirs = state_dict_to_reference(MegalodonForCausalLM(megalodon).state_dict(), megalodon)
    with pytest.raises(ValueError, match="the config gives it"):
        state_dict_from_reference(theirs, gecko)
