"""Window attention by its definition: every token looks back, one by one, at the last W tokens of its document."""

from __future__ import annotations

import torch
from torch import Tensor

from megalodon.ops.backend import full_precision
from megalodon.ops.layout import Layout
from megalodon.ops.recent import with_recent
from megalodon.ops.window_attention.sums import WindowSums


def window_sums(q: Tensor, k: Tensor, v: Tensor, window: int, recent, layout: Layout) -> WindowSums:
    """See `megalodon.ops.window_attention`."""
    wide, batch, length, heads = full_precision(q.dtype), *q.shape[:3]
    before = 0 if recent is None else recent.keys.shape[1]
    groups = heads // k.shape[2]
    keys = with_recent(recent and recent.keys, k, before).to(wide).repeat_interleave(groups, 2)
    values = with_recent(recent and recent.values, v, before).to(wide).repeat_interleave(groups, 2)
    sums = [torch.zeros(batch, length, heads, size, dtype=wide, device=q.device) for size in (v.shape[3], 1, 1)]
    for b in range(batch):
        for t in range(int(layout.lengths[b])):
            seen = min(int(layout.document_positions[b, t]), window - 1)
            span = slice(before + t - seen, before + t + 1)
            scores = torch.einsum("hd,khd->hk", q[b, t].to(wide), keys[b, span])
            highest = scores.amax(1, keepdim=True)
            weights = (scores - highest).exp()
            parts = (torch.einsum("hk,khd->hd", weights, values[b, span]), weights.sum(1, keepdim=True), highest)
            for total, part in zip(sums, parts, strict=True):
                total[b, t] = part
    return WindowSums(sums[0], sums[1][..., 0], sums[2][..., 0])


def window_attention(q: Tensor, k: Tensor, v: Tensor, window: int, recent, layout: Layout) -> Tensor:
    """See `megalodon.ops.window_attention`."""
    sums = window_sums(q, k, v, window, recent, layout)
    return (sums.values / sums.weights.clamp_min(1e-30)[..., None]).to(v.dtype)
