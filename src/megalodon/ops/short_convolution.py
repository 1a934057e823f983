"""Causal depthwise convolution of a few taps, carried from piece to piece."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalodon.ops.layout import Layout
from megalodon.ops.recent import delayed, recent_after, with_recent

CACHEFUL = 1 << 17
"""Elements that are worked on together, so that the taps find them in the cache."""


class _Plain(torch.autograd.Function):
    """Of rows of one document: joined [B, K - 1 + L, D], weight [D, K], bias [D] or None -> [B, L, D], a cacheful of
    tokens at a time."""

    @staticmethod
    def forward(ctx: Any, joined: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(joined, weight)
        taps = weight.t().contiguous()
        size = _tokens(joined)
        count = len(taps)
        y = joined.new_empty(len(joined), joined.shape[1] - count + 1, joined.shape[2])
        for row, out in zip(joined, y, strict=True):
            for start in range(0, len(out), size):
                tile = out[start : start + size]
                parts = [row[start + tap : start + tap + len(tile)] for tap in range(count)]
                torch.mul(parts[-1], taps[-1], out=tile)
                if bias is not None:
                    tile += bias
                for tap in reversed(range(count - 1)):
                    tile.addcmul_(parts[tap], taps[tap])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor):
        joined, weight = ctx.saved_tensors
        taps, size = weight.t().contiguous(), _tokens(joined)
        count = len(taps)
        wanted = ctx.needs_input_grad
        d_joined = torch.zeros_like(joined) if wanted[0] else None
        d_taps = torch.zeros_like(taps) if wanted[1] else None
        for number, (row, d_row) in enumerate(zip(joined, dy, strict=True)):
            for start in range(0, len(d_row), size):
                tile = d_row[start : start + size]
                for tap in range(count):
                    here = slice(start + tap, start + tap + len(tile))
                    if d_joined is not None:
                        d_joined[number, here].addcmul_(tile, taps[tap])
                    if d_taps is not None:
                        d_taps[tap] += (tile * row[here]).sum(0)
        d_bias = dy.sum((0, 1)) if wanted[2] else None
        return d_joined, None if d_taps is None else d_taps.t(), d_bias


def _tokens(joined: Tensor) -> int:
    """How many tokens of a row are worked on together."""
    return max(CACHEFUL // joined.shape[2], 1) if joined.device.type == "cpu" else joined.shape[1]


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
    if layout.starts is None and x.dtype == weight.dtype and not torch.compiler.is_compiling() and x.numel():
        return _Plain.apply(joined, weight, bias), recent_after(joined, taps - 1, layout)
    y = delayed(joined, taps - 1, 0, layout) * weight[:, -1]
    if bias is not None:
        y = y + bias
    for by in range(1, taps):
        y = torch.addcmul(y, delayed(joined, taps - 1, by, layout), weight[:, taps - 1 - by])
    return y, recent_after(joined, taps - 1, layout)
