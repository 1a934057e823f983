"""Window attention in blocks of T queries, each beside the T + W - 1 keys that its queries may see."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from megalodon.ops.backend import full_precision, matmul_dtype
from megalodon.ops.layout import Layout
from megalodon.ops.recent import with_recent
from megalodon.ops.window_attention.sums import WindowSums

LEAST_BLOCK = 64
"""Queries in a block, where an eighth of the window is not more: blocks of T do (T + W) / W of the work that is due."""


def window_attention(q: Tensor, k: Tensor, v: Tensor, window: int, recent, layout: Layout) -> Tensor:
    """See `megalodon.ops.window_attention`."""
    with torch.autocast(q.device.type, enabled=False):
        wide = matmul_dtype(v)
        if recent is None and q.shape[1] <= window and layout.plain and not layout.positions.any():
            return _over_all(q.to(wide), k.to(wide), v.to(wide)).to(v.dtype)
        queries, keys, values, seen = _arranged(q.to(wide), k.to(wide), v.to(wide), window, recent, layout)
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen, scale=1.0)
        return _restored(out, q).to(v.dtype)


def window_sums(q: Tensor, k: Tensor, v: Tensor, window: int, recent, layout: Layout) -> WindowSums:
    """See `megalodon.ops.window_attention`."""
    with torch.autocast(q.device.type, enabled=False):
        wide = full_precision(q.dtype)
        queries, keys, values, seen = _arranged(q.to(wide), k.to(wide), v.to(wide), window, recent, layout)
        scores = (queries @ keys.transpose(-1, -2)).masked_fill(~seen, -torch.inf)
        highest = scores.amax(-1, keepdim=True)
        weights = (scores - highest).exp()
        total = weights.sum(-1, keepdim=True)
        parts = [_restored(part, q) for part in (weights @ values, total, highest)]
        return WindowSums(parts[0], parts[1][..., 0], parts[2][..., 0])


def _over_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention to all tokens before, [B, L, H, e]: what a window is that nothing has left."""
    repeats = q.shape[2] // k.shape[2]
    keys, values = (x.repeat_interleave(repeats, 2) if repeats > 1 else x for x in (k, v))
    queries, keys, values = (x.transpose(1, 2) for x in (q, keys, values))
    return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=1.0).transpose(1, 2)


def _arranged(
    q: Tensor, k: Tensor, v: Tensor, window: int, recent, layout: Layout
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries [B n, G, R T, d], keys [B n, G, K, d], values [B n, G, K, e], and what is seen: bool [B n or 1, 1, R T,
    K]."""
    batch, length, heads = q.shape[:3]
    size = min(max(window // 8, LEAST_BLOCK), length) or 1
    count, groups = -(-length // size) or 1, heads // k.shape[2]
    unused, before = count * size - length, window - 1
    queries = F.pad(q, (0, 0, 0, 0, 0, unused)).view(batch, count, size, -1, groups, q.shape[3])
    queries = queries.permute(0, 1, 3, 4, 2, 5).reshape(batch * count, -1, groups * size, q.shape[3])

    def spans(x: Tensor, old: Tensor | None) -> Tensor:
        if old is not None:
            old = old[:, old.shape[1] - before :]
        joined = F.pad(with_recent(old, x, before), (0, 0, 0, 0, 0, unused))
        return joined.unfold(1, size + before, size).permute(0, 1, 2, 4, 3).flatten(0, 1)

    old_keys, old_values = (None, None) if recent is None else recent
    keys, values = spans(k, old_keys), spans(v, old_values)
    lag = torch.arange(size, device=q.device)[:, None] + before - torch.arange(size + before, device=q.device)
    seen = (lag >= 0) & (lag <= before)
    if not (layout.plain and (layout.batch == 0 or int(layout.positions.min()) >= before)):
        places = layout.token_positions  # [L] or [B, L]
        places = places if places.ndim == 2 else places[None]
        places = F.pad(places, (0, unused), value=before).view(-1, count, size, 1)
        seen = seen & (lag <= places)
        if len(seen) != batch:
            seen = seen.expand(batch, -1, -1, -1)
        seen = seen.reshape(batch * count, 1, size, -1)
    else:
        seen = seen[None, None]
    return queries, keys, values, seen.repeat(1, 1, groups, 1) if groups > 1 else seen


def _restored(out: Tensor, q: Tensor) -> Tensor:
    """[B n, G, R T, e] -> [B, L, H, e]."""
    batch, length, heads = q.shape[:3]
    count = out.shape[0] // max(batch, 1)
    groups = heads // out.shape[1]
    out = out.unflatten(2, (groups, -1)).unflatten(0, (batch, count)).permute(0, 1, 4, 2, 3, 5)
    return out.reshape(batch, -1, heads, out.shape[-1])[:, :length]
