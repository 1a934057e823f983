"""The table of mixers under test, tiny models of them, and the authors' vectors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from megalodon import KinConfig, KinForCausalLM
from megalodon.models.kin.mixers import Mixer
from megalodon.ops import layout_of

VOCABULARY = 97

CAUSAL: dict[str, dict[str, Any]] = {
    "attention": {},
    "attamba": {"chunk": 5, "leading": 3, "state_size": 4},
    "base_conv": {},
    "based": {"feature_dim": 4},
    "feedforward_kernel": {},
    "gated_delta": {},
    "gecko": {"chunk_size": 8, "cema_ndim": 4},
    "gla": {"gate_rank": 4},
    "h3": {"state_size": 8, "head_dim": 2},
    "hax": {"state_size": 4, "keys": 8, "bits": 2},
    "hip": {"mask_size": 6, "query_block": 4, "key_block": 2, "window": 5, "sinks": 3},
    "hedgehog": {},
    "hyena": {"max_length": 4096, "filter_width": 16},
    "lizard": {"window": 5},
    "lolcats": {"window": 5},
    "mamba": {"state_size": 4},
    "mamba2": {"state_size": 8, "head_dim": 16, "groups": 2},
    "megalodon": {"chunk_size": 8, "cema_ndim": 4},
    "phi_mamba": {"state_size": 8},
    "retention": {},
    "scout": {"segment": 4, "local_parameters": {"state_size": 4}},
    "sliding_attention": {"window": 6},
    "window_memory": {"chunk_size": 8, "feature_dim": 6},
}
"""Every causal mixer, with the parameters that make its windows, chunks and states as small as tests need."""


@cache
def tiny_model(name: str) -> KinForCausalLM:
    """Two layers of a mixer with every parameter away from its initial value, in evaluation mode."""
    parameters = {name: CAUSAL[name]} if CAUSAL[name] else None
    torch.manual_seed(7)
    config = KinConfig(
        mixers=name, num_layers=2, model_dim=32, num_heads=4, vocab_size=VOCABULARY, mixer_parameters=parameters
    )
    model = KinForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tokens(batch: int, length: int) -> Tensor:
    """Random token ids."""
    return torch.randint(0, VOCABULARY, (batch, length))


def relative(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude; 0 for nothing."""
    if not expected.numel():
        return 0.0
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


class Golden(NamedTuple):
    """One case of a file of vectors: its config and all tensors, named without the case."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def named(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin so, without the prefix."""
        return {name.removeprefix(prefix): x for name, x in self.tensors.items() if name.startswith(prefix)}


def golden(shared: Path, file: str, case: str) -> Golden:
    """A case of `golden/kin/<file>.safetensors`."""
    with safe_open(shared / "golden" / "kin" / f"{file}.safetensors", "pt") as opened:
        meta = json.loads(opened.metadata()["meta"])
        names = [name for name in opened.keys() if name.startswith(f"{case}.")]  # noqa: SIM118
        tensors = {name.removeprefix(f"{case}."): opened.get_tensor(name) for name in names}
    cases = meta.get("cases")
    config = cases[case]["config"] if cases else meta["config"].get(case, meta["config"])
    return Golden(config, tensors)


def whole_file(shared: Path, file: str) -> Golden:
    """All of `golden/kin/<file>.safetensors`: its metadata, and the tensors under their full names."""
    with safe_open(shared / "golden" / "kin" / f"{file}.safetensors", "pt") as opened:
        meta = json.loads(opened.metadata()["meta"])
        return Golden(meta, {name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118


def check_mixer(mixer: Mixer, vectors: Golden, renamed: Mapping[str, str] | None = None) -> None:
    """That a mixer gives a golden file's y for its u, and for its dy the gradients of u and of all parameters.

    Args:
        renamed: our name of a parameter -> the authors', where they differ.
    """
    u = vectors.tensors["u"].clone().requires_grad_()
    y, _ = mixer(u, None, layout_of(u.shape[0], u.shape[1], u.device))
    assert relative(y, vectors.tensors["y"]) < 1e-5
    y.backward(vectors.tensors["dy"])
    assert relative(u.grad, vectors.tensors["du"]) < 1e-4
    expected = vectors.named("grad.")
    named = {(renamed or {}).get(name, name): parameter for name, parameter in mixer.named_parameters()}
    assert {name for name, parameter in named.items() if parameter.grad is not None} == set(expected)
    for name, gradient in expected.items():
        found = named[name].grad
        assert relative(found.reshape(gradient.shape), gradient) < 1e-4, name
