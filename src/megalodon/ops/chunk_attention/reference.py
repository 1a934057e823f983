"""Chunk attention by its definition: every token looks back, one by one, at its own chunk of its own document."""

from __future__ import annotations

import torch
from torch import Tensor

from megalodon.ops.backend import full_precision
from megalodon.ops.layout import Layout


def chunk_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix: tuple[Tensor, Tensor] | None, layout: Layout, dropout: float, dropkey: bool
) -> Tensor:
    """See `megalodon.ops.chunk_attention`; `prefix` holds [B, n, H, d] keys and values, row b's first offsets[b]
    valid.
    """
    assert layout.chunk_size is not None
    wide = full_precision(q.dtype)
    out = torch.zeros_like(v)
    for b in range(layout.batch):
        offset = int(layout.offsets[b])
        keys, values = k[b], v[b]
        if prefix is not None:
            keys = torch.cat([prefix[0][b, :offset].to(k.dtype), keys])
            values = torch.cat([prefix[1][b, :offset].to(v.dtype), values])
        for t in range(int(layout.lengths[b])):
            seen = int(layout.document_positions[b, t]) % layout.chunk_size
            window = slice(offset + t - seen, offset + t + 1)
            scores = torch.einsum("hd,khd->hk", q[b, t].to(wide), keys[window].to(wide))
            if dropkey:
                scores = drop_keys(scores, dropout)
            weights = scores.softmax(-1)
            if not dropkey:
                weights = torch.nn.functional.dropout(weights, dropout)
            out[b, t] = torch.einsum("hk,khd->hd", weights, values[window].to(wide)).to(v.dtype)
    return out


def drop_keys(scores: Tensor, dropout: float) -> Tensor:
    """DropKey: scores set to -inf at random, never a token's own (the last), so that something is always left."""
    dropped = torch.rand_like(scores) < dropout
    dropped[..., -1] = False
    return scores.masked_fill(dropped, -torch.inf)
