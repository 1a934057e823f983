"""Sparse attention in strips of queries. A strip takes either the keys that its queries name, gathered, or all keys,
masked; its scores live for the strip only, and backward computes them again.

Gathering pays where few keys are named among many: it moves every chosen value once for each block of queries, while
the masked form multiplies with all of them at the speed of a matrix product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

STRIP_NUMBERS = 2**21
"""Scores, or gathered numbers, that live at once."""

GATHER_ADVANTAGE = 16
"""How many times fewer keys must be named than there are, times queries in a block, before gathering is taken."""


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, keys: Tensor | None, query_block: int, scale: float
) -> Tensor:
    """See `megalodon.ops.sparse_attention`."""
    if not q.numel() or not v.numel():
        return q.new_zeros(*q.shape[:3], v.shape[-1])
    q = q * scale
    if keys is not None and keys.shape[-1] * GATHER_ADVANTAGE <= k.shape[1] * query_block:
        return _gathered(q, k, v, mask, keys, query_block)
    if keys is not None:
        return _listed(q, k, v, mask, keys, query_block)
    assert mask is not None
    return _masked(q, k, v, mask)


def _attend(scores: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """(weights, their sum [..., 1], 1 where a query sees nothing)."""
    scores = scores.masked_fill(~visible, -torch.inf)
    highest = scores.detach().amax(-1, keepdim=True)
    weights = (scores - highest.masked_fill(highest.isinf(), 0)).exp()
    total = weights.sum(-1, keepdim=True)
    return weights, total.masked_fill(total == 0, 1)


def _masked_strip(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """q [B, l, H, d]; k, v [B, G, S, .]; visible [B or 1, H or 1, l, S]."""
    groups = k.shape[1]
    rows = q.transpose(1, 2).unflatten(1, (groups, -1))  # [B, G, H/G, l, d]
    scores = (rows.flatten(2, 3) @ k.mT).view(*rows.shape[:4], -1)
    weights, total = _attend(scores, _per_group(visible, groups))
    out = (weights.flatten(2, 3) @ v).view(*rows.shape[:4], -1) / total
    return out.flatten(1, 2).transpose(1, 2)


def _per_group(visible: Tensor, groups: int) -> Tensor:
    """[., H or 1, ...] -> [., G or 1, H/G or 1, ...]."""
    return visible.unsqueeze(2) if visible.shape[1] == 1 else visible.unflatten(1, (groups, -1))


def _recomputed(strip: Callable[..., Tensor], *arguments: Tensor | None) -> Tensor:
    if not torch.is_grad_enabled():
        return strip(*arguments)
    return checkpoint(strip, *arguments, use_reentrant=False, preserve_rng_state=False)


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    step = max(1, STRIP_NUMBERS // (q.shape[0] * q.shape[2] * k.shape[2]))
    strips = [
        _recomputed(_masked_strip, q[:, i : i + step], k, v, mask[:, :, i : i + step])
        for i in range(0, q.shape[1], step)
    ]
    return torch.cat(strips, dim=1)


def _listed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, keys: Tensor, query_block: int) -> Tensor:
    """Lists of keys, as a mask over all of them, made strip by strip."""
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    length, size = q.shape[1], k.shape[2]

    def strip(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
        listed = keys.repeat_interleave(query_block, dim=2)[:, :, : q.shape[1]]
        seen = listed >= 0 if mask is None else (listed >= 0) & mask
        heads = max(listed.shape[1], seen.shape[1])
        listed, seen = listed.expand(-1, heads, -1, -1), seen.expand(-1, heads, -1, -1)
        # what is not seen goes to a column of its own, which is cut off
        visible = torch.zeros(*listed.shape[:3], size + 1, dtype=torch.bool, device=keys.device)
        visible.scatter_(-1, torch.where(seen, listed, size), True)
        return _masked_strip(q, k, v, visible[..., :size])

    blocks = max(1, STRIP_NUMBERS // (q.shape[0] * q.shape[2] * size * query_block))
    outputs = []
    for first in range(0, keys.shape[2], blocks):
        span = slice(first * query_block, min((first + blocks) * query_block, length))
        seen = None if mask is None else mask[:, :, span]
        outputs.append(_recomputed(strip, q[:, span], k, v, keys[:, :, first : first + blocks], seen))
    return torch.cat(outputs, dim=1)


def _gather(values: Tensor, keys: Tensor) -> Tensor:
    """values [B, G, S, w], keys [B, G or 1, n, K] -> [B, G, n, K, w]; a missing key gives the first one."""
    batch, groups, size, width = values.shape
    rows = torch.arange(batch * groups, device=keys.device).view(batch, groups, 1, 1) * size
    index = (keys.clamp(min=0) + rows).flatten()
    return values.reshape(-1, width).index_select(0, index).view(batch, groups, *keys.shape[2:], width)


def _gathered(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, keys: Tensor, query_block: int) -> Tensor:
    if keys.shape[1] not in (1, k.shape[2]):  # lists of each query head: keys and values must be of each, too
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    k, v = k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()
    batch, groups, length = q.shape[0], k.shape[1], q.shape[1]

    def strip(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
        fill = keys.shape[2] * query_block - q.shape[1]
        rows = torch.nn.functional.pad(q, (0, 0, 0, 0, 0, fill)).unflatten(1, (-1, query_block))
        rows = rows.permute(0, 3, 1, 2, 4).unflatten(1, (groups, -1))  # [B, G, H/G, n, bq, d]
        seen = (keys >= 0).unsqueeze(3)
        if mask is not None:
            seen = seen & torch.nn.functional.pad(mask, (0, 0, 0, fill)).unflatten(2, (-1, query_block))
        scores = rows @ _gather(k, keys).mT.unsqueeze(2)
        weights, total = _attend(scores, _per_group(seen, groups))
        out = (weights @ _gather(v, keys).unsqueeze(2)) / total
        return out.flatten(1, 2).permute(0, 2, 3, 1, 4).flatten(1, 2)[:, : q.shape[1]]

    numbers = batch * groups * keys.shape[3] * max(v.shape[-1], k.shape[-1], query_block * q.shape[2] // groups)
    blocks = max(1, STRIP_NUMBERS // numbers)
    outputs = []
    for first in range(0, keys.shape[2], blocks):
        span = slice(first * query_block, min((first + blocks) * query_block, length))
        seen = None if mask is None else mask[:, :, span]
        outputs.append(_recomputed(strip, q[:, span], k, v, keys[:, :, first : first + blocks], seen))
    return torch.cat(outputs, dim=1)
