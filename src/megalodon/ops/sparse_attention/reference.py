"""Sparse attention by its definition: every score, the masked ones dropped. Any dtype, any device."""

from __future__ import annotations

import torch
from torch import Tensor


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, keys: Tensor | None, query_block: int, scale: float
) -> Tensor:
    """`sum_i softmax_i(scale q_t . k_i) v_i` over the keys that t sees; see `megalodon.ops.sparse_attention`."""
    length, heads, size = q.shape[1], q.shape[2], k.shape[1]
    visible = mask if keys is None else _dense(mask, keys, query_block, length, size)
    assert visible is not None
    if visible.shape[1] not in (1, heads):
        visible = visible.repeat_interleave(heads // visible.shape[1], dim=1)
    k, v = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("blhd,bshd->bhls", q, k) * scale
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    weights = weights.masked_fill(~visible.any(-1, keepdim=True), 0)
    return torch.einsum("bhls,bshe->blhe", weights, v)


def _dense(mask: Tensor | None, keys: Tensor, query_block: int, length: int, size: int) -> Tensor:
    """bool [B, H or 1, L, S]: which keys each query sees."""
    listed = keys.repeat_interleave(query_block, dim=2)[:, :, :length]
    seen = listed >= 0 if mask is None else (listed >= 0) & mask
    heads = max(listed.shape[1], seen.shape[1])
    listed, seen = (x.expand(-1, heads, -1, -1) for x in (listed, seen))
    counts = torch.zeros(*listed.shape[:3], size, dtype=torch.int64, device=keys.device)
    return counts.scatter_add(-1, listed.clamp(min=0), seen.long()) > 0
