"""Contexts of models whose memories grow, or whose chunks fill and empty: saved, loaded, gone on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalodon import KinConfig, KinForCausalLM
from megalodon.data import ByteTokenizer
from megalodon.inference import Context, Session

SIZES: dict[str, Any] = {"num_layers": 2, "model_dim": 32, "num_heads": 4, "vocab_size": 272}


@torch.inference_mode()
@pytest.mark.parametrize(
    ("mixer", "parameters"),
    [
        ("attention", {}),
        ("hip", {"mask_size": 4, "query_block": 4, "window": 4, "sinks": 2}),
        ("attamba", {"chunk": 5, "leading": 3, "state_size": 4}),
        ("gecko", {"chunk_size": 8, "cema_ndim": 4}),
        ("lolcats", {"window": 5}),
    ],
)
def test_a_saved_context_goes_on(mixer: str, parameters: dict[str, Any], tmp_path: Path) -> None:
    model = KinForCausalLM(KinConfig(mixers=mixer, mixer_parameters={mixer: parameters}, **SIZES)).eval()
    tokenizer = ByteTokenizer()
    ids = np.random.default_rng(0).integers(0, 256, 45)
    session = Session(model, None, 0)
    session.read(iter([ids]))
    session.context.save(tmp_path / "context", model, tokenizer)
    loaded = Session(model, Context.load(tmp_path / "context", model, tokenizer), 0)
    assert loaded.tokens == session.tokens == 45
    wanted, found = (
        model(torch.tensor([[one.context.pending, 3, 4]]), past_key_values=one.context.state).logits
        for one in (session, loaded)
    )
    assert (wanted == found).all()
