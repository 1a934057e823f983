"""What `multiply_adds` says of mixers that choose their keys, against the pairs that they are seen to attend to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kin_cases import tokens

from megalodon import KinConfig, KinForCausalLM, ops
from megalodon.models.kin.mixers import mixer_class

LENGTH = 300


def counted(name: str, parameters: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """(multiply-adds a token of scores and weighted values, those that the mixer names)."""
    config = KinConfig(
        mixers=name, mixer_parameters={name: parameters}, num_layers=1, model_dim=64, num_heads=4, vocab_size=97
    )
    attend, pairs = ops.sparse_attention, 0.0

    def counting(q, k, v, mask=None, keys=None, query_block=1, **rest):
        nonlocal pairs
        shape = (*q.shape[:1], q.shape[2], q.shape[1])
        if keys is None:
            seen = mask
        else:
            seen = (keys >= 0).repeat_interleave(query_block, dim=2)[:, :, : q.shape[1]]
            seen = seen if mask is None else seen & mask
        pairs += float(seen.expand(*shape, seen.shape[-1]).sum()) * (q.shape[-1] + v.shape[-1])
        return attend(q, k, v, mask, keys, query_block, **rest)

    monkeypatch.setattr(ops, "sparse_attention", counting)
    with torch.no_grad():
        KinForCausalLM(config).eval()(tokens(1, LENGTH), use_cache=False)
    return pairs / LENGTH, mixer_class(name).multiply_adds(config, config.mixer_of(0)[1], LENGTH)


@pytest.mark.parametrize(
    ("name", "parameters", "aside"),
    [
        ("scout", {"segment": 7}, 0),
        ("attamba", {"offset": 0, "chunk": 5, "leading": 4}, 0),
        ("attamba", {"offset": 0, "chunk": 5, "leading": 0}, 0),
        ("hax", {"selection": ["window"], "keys": 32}, 0),
        ("hax", {"selection": ["dilated"], "keys": 32, "dilated_length": 128}, 0),
        ("hip", {"mask_size": 16, "query_block": 8, "window": 16, "sinks": 0}, 4 * 16),
    ],
)
def test_keys_that_positions_choose_are_counted_exactly(name, parameters, aside, monkeypatch) -> None:
    seen, said = counted(name, parameters, monkeypatch)
    if aside:  # the search, of numbers of the key's size: halvings of twice the mask for each block of queries
        blocks = [max(t // 8 * 8 + 1 - 16, 0) // 2 for t in range(LENGTH)]
        said -= (
            aside
            * sum(2 * 16 / 8 * max(0, (count / 8 - 1e-9).__ceil__() - 1).bit_length() for count in blocks)
            / LENGTH
        )
    assert said == pytest.approx(seen, rel=1e-6)


@pytest.mark.parametrize(("name", "parameters"), [("hax", {}), ("hip", {"mask_size": 16, "window": 16})])
def test_keys_that_the_text_chooses_are_counted_as_most(name, parameters, monkeypatch) -> None:
    seen, said = counted(name, parameters, monkeypatch)
    assert seen <= said < 3 * seen
