"""Gecko beside Megalodon: `benchmarks/cpu_peers.py --also benchmarks/gecko.py --without llama --without mamba`.

Megalodon's sizes there, so that the two differ in nothing but what makes Gecko: its parameters are a few thousand more
in the affines of queries and keys, and fewer in CEMA.
"""

from __future__ import annotations

import torch

from megalodon import GeckoConfig, GeckoForCausalLM

NAME = "gecko"
DESCRIPTION = "Gecko with Megalodon's sizes"
CACHE_ARGUMENT = "past_key_values"


def build(vocab_size: int, width: int, depth: int, parameters: int) -> torch.nn.Module:
    """A model of Megalodon's sizes in `_workloads.build_megalodon`."""
    return GeckoForCausalLM(
        GeckoConfig(
            vocab_size=vocab_size,
            num_layers=depth,
            model_dim=width,
            z_dim=width // 4,
            value_dim=2 * width,
            ffn_hidden_dim=2 * width,
            num_heads=1,
            cema_ndim=16,
            chunk_size=512,
            norm_num_groups=32,
        )
    )
