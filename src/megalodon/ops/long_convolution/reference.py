"""The causal convolution by its definition, one token at a time. Any dtype, any device."""

from __future__ import annotations

import torch
from torch import Tensor

from megalodon.ops.layout import Layout


def long_convolution(x: Tensor, kernel: Tensor, history: Tensor, layout: Layout) -> Tensor:
    """`y_t = sum_j kernel_j x_{t-j}` over the tokens of t's document; see `megalodon.ops.long_convolution`."""
    (batch, length), before, taps = x.shape[:2], history.shape[1], kernel.shape[1]
    inputs = torch.cat([history, x], dim=1)
    rows = []
    for row in range(batch):
        outputs = []
        for t in range(length):
            start = int(layout.document_start[row, t])
            first = max(before + start if start else 0, before + t + 1 - taps)
            seen = inputs[row, first : before + t + 1].flip(0)
            y = (kernel.mT[: len(seen)] * seen).sum(0)
            outputs.append(y if t < layout.lengths[row] else torch.zeros_like(y))
        rows.append(torch.stack(outputs) if outputs else x[row])
    return torch.stack(rows) if rows else x
