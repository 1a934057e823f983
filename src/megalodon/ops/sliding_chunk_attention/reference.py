"""Sliding chunk attention by its definition: every token looks, one by one, at its own chunk and the one before it."""

from __future__ import annotations

import torch
from torch import Tensor

from megalodon.ops.backend import full_precision
from megalodon.ops.chunk_attention.reference import drop_keys
from megalodon.ops.layout import Layout
from megalodon.ops.prefix import Prefix
from megalodon.ops.segments import Segments


def sliding_chunk_attention(
    q: Tensor,
    q_before: Tensor | None,
    k: Tensor,
    v: Tensor,
    prefix: Prefix,
    layout: Layout,
    segments: Segments | None,
    dropout: float,
    dropkey: bool,
) -> Tensor:
    """See `megalodon.ops.sliding_chunk_attention`."""
    size, wide = layout.chunk_size, full_precision(q.dtype)
    assert size is not None
    turned = q if q_before is None else q_before
    out = torch.zeros_like(v)
    for b in range(layout.batch):
        seen = int(layout.positions[b])
        keys, values, kept = prefix.of_row(b, seen, size, k, v)
        bos = [] if segments is None else segments.bos[b].tolist()
        last = -1 if segments is None else int(segments.carried[b])
        for t in range(int(layout.lengths[b])):
            position = int(layout.document_positions[b, t])
            document = t - int(layout.document_start[b, t])
            if segments is not None and document == 0 and t > 0:
                last = -1
            if segments is not None and bos[t]:
                last = position
            first = max((position // size - 1) * size, 0, last)
            window = range(kept + t - (position - first), kept + t + 1)
            own = position % size + 1
            k_window, v_window = keys[window.start : window.stop], values[window.start : window.stop]
            scores = torch.einsum("hd,khd->hk", q[b, t].to(wide), k_window[-own:].to(wide))
            if len(window) > own:
                earlier = torch.einsum("hd,khd->hk", turned[b, t].to(wide), k_window[:-own].to(wide))
                scores = torch.cat([earlier, scores], dim=-1)
            if dropkey:
                scores = drop_keys(scores, dropout)
            weights = scores.softmax(-1)
            if not dropkey:
                weights = torch.nn.functional.dropout(weights, dropout)
            out[b, t] = torch.einsum("hk,khd->hd", weights, v_window.to(wide)).to(v.dtype)
    return out
