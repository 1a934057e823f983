"""Causal depthwise convolution of a few taps, carried from piece to piece."""

from __future__ import annotations

import torch
from torch import Tensor

from megalodon.ops.layout import Layout
from megalodon.ops.recent import delayed, recent_after, with_recent


def short_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, recent: Tensor | None, layout: Layout
) -> tuple[Tensor, Tensor]:
    """`y_t = sum_j weight[:, j] x_{t - K + 1 + j} + bias`: tap K - 1 multiplies the current token.

    Documents begin with zeros before them.

    Args:
        x: [B, L, D].
        weight: [D, K].
        bias: [D] or None.
        recent: [B, K - 1, D]; the tokens before the first. None: zeros.
        layout: the batch's layout.

    Returns:
        (y [B, L, D], the last K - 1 tokens of each row [B, K - 1, D]).
    """
    taps = weight.shape[1]
    joined = with_recent(recent, x, taps - 1)
    y = delayed(joined, taps - 1, 0, layout) * weight[:, -1]
    if bias is not None:
        y = y + bias
    for by in range(1, taps):
        y = torch.addcmul(y, delayed(joined, taps - 1, by, layout), weight[:, taps - 1 - by])
    return y, recent_after(joined, taps - 1, layout)
