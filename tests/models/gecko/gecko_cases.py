"""A tiny Gecko with every parameter away from its initial value, and comparisons of states."""

from __future__ import annotations

from typing import Any

import torch
from model_cases import VOCABULARY, relative

from megalodon import GeckoConfig, GeckoForCausalLM, GeckoState

BOS = 1


def tiny_gecko(**fields: Any) -> GeckoForCausalLM:
    """Two layers, chunks of 8, two heads, statistics that decay quickly."""
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
        "norm_beta1": 0.95,
        "norm_beta2": 0.98,
    }
    generator = torch.Generator().manual_seed(7)
    torch.manual_seed(7)
    model = GeckoForCausalLM(GeckoConfig(**{**sizes, **fields}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def segmented_gecko(**fields: Any) -> GeckoForCausalLM:
    """One whose BOS tokens cut segments."""
    return tiny_gecko(multi_segments=True, bos_token_id=BOS, **fields)


def state_difference(actual: GeckoState, expected: GeckoState) -> float:
    """The largest relative difference of any tensor that counts; whole numbers must be equal."""
    assert torch.equal(actual.position, expected.position)
    mine, theirs = actual.state_dict(), expected.state_dict()
    worst = 0.0
    for name, value in theirs.items():
        if not value.is_floating_point():
            assert torch.equal(mine[name], value), name
            continue
        one, other = mine[name].double(), value.double()
        if name.endswith("log_mass"):  # nothing at all has the log -inf
            one, other = one.exp(), other.exp()
        worst = max(worst, relative(one, other))
    return worst
