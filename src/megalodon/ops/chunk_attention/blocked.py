"""Chunk attention as a few dense rectangles.

Rows at one common place in their chunks give at most three: what completes the open chunk, the whole chunks, the rest.
Anything else (packed documents, padding, rows at different places) goes through the layout's bins.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalodon.ops.chunk_attention.causal import causal_attention
from megalodon.ops.gate import silu
from megalodon.ops.layout import Layout
from megalodon.ops.tiles import move_rows, tokens_of


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix: tuple[Tensor, Tensor] | None,
    layout: Layout,
    dropout: float,
    dropkey: bool,
    activates: bool = False,
) -> Tensor:
    """See `megalodon.ops.chunk_attention`; `prefix` holds [B, n, H, d] keys and values, row b's first offsets[b]
    valid.
    """
    with torch.autocast(q.device.type, enabled=False):
        if q.shape[1] == 0 or q.shape[0] == 0:
            return v
        if activates and layout.uniform_offset != 0:
            v, activates = silu(v), False
        if layout.uniform_offset is not None:
            return _uniform(q, k, v, prefix, layout, dropout, dropkey, activates)
        return _binned(q, k, v, prefix, layout, dropout, dropkey)


def _uniform(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix: tuple[Tensor, Tensor] | None,
    layout: Layout,
    dropout: float,
    dropkey: bool,
    activates: bool,
) -> Tensor:
    chunk, offset = layout.chunk_size, layout.uniform_offset
    assert chunk is not None and offset is not None
    length = q.shape[1]
    head = min(length, chunk - offset) if offset else 0
    whole = (length - head) // chunk * chunk
    outputs = []
    if head:
        assert prefix is not None
        keys = torch.cat([prefix[0][:, :offset].to(k.dtype), k[:, :head]], dim=1)
        values = torch.cat([prefix[1][:, :offset].to(v.dtype), v[:, :head]], dim=1)
        outputs.append(causal_attention(q[:, :head], keys, values, offset, None, dropout, dropkey))
    if whole:
        queries, keys, values = (tokens_of(x, head, head + whole).reshape(-1, chunk, *x.shape[2:]) for x in (q, k, v))
        out = causal_attention(queries, keys, values, 0, None, dropout, dropkey, activates)
        outputs.append(out.reshape(len(q), whole, *v.shape[2:]))
    if head + whole < length:
        queries, keys, values = (x[:, head + whole :] for x in (q, k, v))
        outputs.append(causal_attention(queries, keys, values, 0, None, dropout, dropkey, activates))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _binned(
    q: Tensor, k: Tensor, v: Tensor, prefix: tuple[Tensor, Tensor] | None, layout: Layout, dropout: float, dropkey: bool
) -> Tensor:
    bins = layout.bins
    count, width = bins.shape

    def arrange(x: Tensor) -> Tensor:
        return move_rows(x.flatten(0, 1), bins.token, bins.slot, count * width)

    q_slots, k_slots, v_slots = arrange(q), arrange(k), arrange(v)
    if prefix is not None and bins.cached.numel():
        cached_k, cached_v = (cached[:, : layout.longest_offset].flatten(0, 1) for cached in prefix)
        k_slots = k_slots + move_rows(cached_k.to(k.dtype), bins.cached, bins.cached_slot, count * width)
        v_slots = v_slots + move_rows(cached_v.to(v.dtype), bins.cached, bins.cached_slot, count * width)
    queries, keys, values = (x.unflatten(0, bins.shape) for x in (q_slots, k_slots, v_slots))
    out = causal_attention(queries, keys, values, 0, bins.first, dropout, dropkey)
    return move_rows(out.flatten(0, 1), bins.slot, bins.token, q.shape[0] * q.shape[1]).unflatten(0, q.shape[:2])
