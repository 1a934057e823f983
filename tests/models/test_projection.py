"""Linear layers as one product: the layers' own numbers, and the layers themselves where a copy would be wrong."""

from __future__ import annotations

import pytest
import torch
from model_cases import relative
from torch import nn

from megalodon.models.layers import projection
from megalodon.models.layers.projection import Projection, can_pack


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gives_what_the_layers_give(rows: int, dtype: torch.dtype) -> None:
    layers = [nn.Linear(24, 40), nn.Linear(24, 7, bias=False), nn.Linear(24, 128)]
    layers = [layer.to(dtype) for layer in layers]
    x = torch.randn(rows, 24, dtype=dtype)
    with torch.no_grad():
        for group in (layers, layers[1:2]):
            for y, layer in zip(Projection(*group, packed=dtype)(x), group, strict=True):
                assert y.shape == (rows, layer.out_features)
                assert relative(y, layer(x)) < (1e-12 if dtype == torch.float64 else 0.02)


def test_without_a_copy_the_layers_are_called() -> None:
    layer = nn.Linear(4, 3)
    seen: list[int] = []
    layer.register_forward_hook(lambda *_: seen.append(1))
    (y,) = Projection(layer, packed=None)(torch.ones(2, 4))
    assert seen == [1] and y.shape == (2, 3)


def test_what_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Adapted(nn.Linear):
        pass

    assert can_pack([nn.Linear(4, 3)], torch.float32)
    assert not can_pack([nn.Linear(4, 3), Adapted(4, 3)], torch.float32)
    assert not can_pack([nn.Linear(4, 3).half()], torch.float32)
    monkeypatch.setattr(projection, "PACKED_AT_MOST", 4 * 3 * 4 - 1)
    assert not can_pack([nn.Linear(4, 3)], torch.float32)
