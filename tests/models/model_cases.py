"""A tiny model with every parameter away from its initial value, and comparisons, shared by the model's tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalodon import MegalodonConfig, MegalodonForCausalLM, MegalodonState

VOCABULARY = 61


def tiny_model(**fields: Any) -> MegalodonForCausalLM:
    """Two layers, chunks of 8, two heads."""
    sizes = {
        "vocab_size": VOCABULARY,
        "num_layers": 2,
        "model_dim": 32,
        "z_dim": 16,
        "value_dim": 32,
        "num_heads": 2,
        "ffn_hidden_dim": 48,
        "cema_ndim": 4,
        "chunk_size": 8,
        "norm_num_groups": 4,
        "swiglu": True,
    }
    generator = torch.Generator().manual_seed(7)
    torch.manual_seed(7)
    model = MegalodonForCausalLM(MegalodonConfig(**{**sizes, **fields}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def relative(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude; 0 for nothing."""
    if not expected.numel():
        return 0.0
    actual, expected = actual.detach(), expected.detach()
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def state_difference(actual: MegalodonState, expected: MegalodonState) -> float:
    """The largest relative difference of any tensor; positions must be equal."""
    assert torch.equal(actual.position, expected.position)
    mine, theirs = actual.state_dict(), expected.state_dict()
    return max(relative(mine[name].double(), theirs[name].double()) for name in theirs)


def gradients(model: MegalodonForCausalLM) -> dict[str, Tensor]:
    """Copies of all gradients, zeros where there is none (a single token never decays a state); then cleared."""
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def gradient_difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative difference of any gradient."""
    assert actual.keys() == expected.keys()
    return max(relative(actual[name], expected[name]) for name in expected)


def tokens(batch: int, length: int) -> Tensor:
    """Random token ids."""
    return torch.randint(0, VOCABULARY, (batch, length))
