"""Linear layers for a few rows: weights laid out so that a step streams them at the memory's speed.

A product of one row, or of a few, with a matrix does almost nothing but read the matrix. Matrix libraries are written
for many rows: on a CPU, `F.linear` of one float32 row reads with one thread and at a fraction of what memory gives.
Cut into narrow blocks of columns, each lying in one piece, the same product is a batch of small ones, which all threads
share: two to three times as quick from 1 row to 64.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

COLUMNS = {torch.float32: 32, torch.float64: 32, torch.bfloat16: 64}
"""Columns of a block, by dtype."""

MOST_ROWS = 64
"""Rows up to which packed weights are the quicker ones."""

PACKED_AT_MOST = 1 << 31
"""Bytes of weights that steps may hold a second time (2 GiB); the layers of larger models are called as they are."""


class Projection:
    """Linear layers of one input, as one product.

    Args:
        layers: of one input width: `nn.Linear`, or what has taken its place.
        packed: copy the weights, as they are now, into blocks of columns of this dtype, which is then that of inputs
            and outputs (see `can_pack`). None: the layers themselves are called.
    """

    def __init__(self, *layers: Any, packed: torch.dtype | None) -> None:
        self.layers = layers
        self.weight: Tensor | None = None  # [k, in, columns]
        if packed is not None:
            self.sizes = [len(layer.weight) for layer in layers]
            weight = torch.cat([layer.weight.detach().to(packed) for layer in layers])
            columns = COLUMNS[packed]
            unused = -len(weight) % columns
            self.weight = F.pad(weight, (0, 0, 0, unused)).unflatten(0, (-1, columns)).transpose(1, 2).contiguous()
            self.bias = None  # [k, 1, columns]
            if any(layer.bias is not None for layer in layers):
                parts = [weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias for layer in layers]
                self.bias = F.pad(torch.cat(parts).detach().to(packed), (0, unused)).view(-1, 1, columns)
            self.sizes += [unused] if unused else []

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """x [M, in] -> [M, out] of each layer."""
        if self.weight is None:
            return [layer(x) for layer in self.layers]
        rows = x.expand(self.weight.shape[0], *x.shape)
        y = torch.bmm(rows, self.weight) if self.bias is None else torch.baddbmm(self.bias, rows, self.weight)
        y = y.transpose(0, 1).reshape(x.shape[0], -1)
        return (y,) if len(self.sizes) == 1 else y.split_with_sizes(self.sizes, 1)[: len(self.layers)]


def can_pack(layers: Iterable[nn.Module], dtype: torch.dtype) -> bool:
    """Whether these layers' weights are worth a second copy in `dtype`: plain layers on a CPU, not too large."""
    size = 0
    for layer in layers:
        weight = layer._parameters.get("weight")
        if type(layer) is not nn.Linear or not is_plain(weight) or weight.dtype not in COLUMNS:
            return False
        size += layer.weight.numel() * dtype.itemsize
    return size <= PACKED_AT_MOST


def is_plain(weight: Tensor | None) -> TypeGuard[nn.Parameter]:
    """Whether a weight is numbers side by side on a CPU, and not another library's tensor that stands for some."""
    return type(weight) is nn.Parameter and weight.device.type == "cpu" and weight.layout is torch.strided
