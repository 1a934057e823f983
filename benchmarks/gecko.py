"""Gecko beside Megalodon: `benchmarks/cpu_peers.py --also benchmarks/gecko.py --without llama --without mamba`.

Megalodon's sizes there, so that the two differ in nothing but what makes Gecko: its parameters are a few thousand more
in the affines of queries and keys, and fewer in CEMA. Chunks are half as long as Megalodon's, as they are in the
authors' 7B models (2,048 and 4,096): a window of two of them sees as far. `CHUNK_SIZE=512` makes them equally long.
"""

from __future__ import annotations

import os

import torch

from megalodon import GeckoConfig, GeckoForCausalLM

CHUNK_SIZE = int(os.environ.get("CHUNK_SIZE", "256"))
NAME = "gecko"
DESCRIPTION = f"Gecko with Megalodon's sizes, in chunks of {CHUNK_SIZE}"
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
            chunk_size=CHUNK_SIZE,
            norm_num_groups=32,
        )
    )
