"""Attention over two chunks of keys, the one before and the query's own: the dense core of sliding chunk attention.

Queries are taken in strips of rows, as in `chunk_attention.causal`: scores exist for one strip at a time and are made
anew in the backward pass. A query has two forms, one for each chunk of keys, because a rotation only knows the place in
a chunk. Whole chunks come one after another, so that the keys before one chunk are those of another: they are never
copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megalodon.ops.backend import full_precision, matmul_dtype
from megalodon.ops.chunk_attention.causal import STRIP, weighted_sum


class Visible(NamedTuple):
    """What queries may see, in a frame where the W keys before come first, then the query's own chunk.

    Attributes:
        offset: int, or int64 [N] where it differs by row; query i stands at place `i + offset` of its own chunk.
        first: int64 [N, L]; the first key of the frame that each query may see. None: 0.
    """

    offset: int | Tensor = 0
    first: Tensor | None = None

    def hidden(self, rows: range, keys: int, width: int, device: torch.device) -> Tensor | None:
        """bool, True where a query of `rows` may not see a key; it covers the last columns of [before, own].

        [rows, columns], or [N, 1, rows, columns] where it differs by row; None: nothing is hidden.
        """
        if self.first is None and isinstance(self.offset, int):
            begin = min(rows.start + self.offset + 1, keys)
            if begin == keys:
                return None
            return torch.ones(len(rows), keys - begin, dtype=torch.bool, device=device).triu()
        i = torch.arange(rows.start, rows.stop, device=device)[:, None] + width
        j = torch.arange(width + keys, device=device)
        mask = j > i + (self.offset if isinstance(self.offset, int) else self.offset[:, None, None, None])
        if self.first is not None:
            mask = mask | (j < self.first[:, None, rows.start : rows.stop, None])
        return mask

    def strips(self, queries: int, keys: int, width: int, device: torch.device) -> Iterator[_Strip]:
        """(rows, how many of the own keys they need, what is hidden) of each strip."""
        for start in range(0, queries, STRIP):
            stop = min(start + STRIP, queries)
            needed = min(keys, stop + self.offset) if isinstance(self.offset, int) else keys
            yield slice(start, stop), needed, self.hidden(range(start, stop), needed, width, device)


_Strip = tuple[slice, int, Tensor | None]


class Before(NamedTuple):
    """Keys and values [n, W, .] that the queries of `rows` see as the chunk before theirs."""

    rows: slice
    keys: Tensor
    values: Tensor


def _befores(k: Tensor, v: Tensor, before_k: Tensor | None, before_v: Tensor | None, chain: int) -> list[Before]:
    found = []
    if before_k is not None and before_v is not None:
        found.append(Before(slice(0, len(before_k)), before_k, before_v))
    if 0 < chain < len(k):
        found.append(Before(slice(chain, len(k)), k[:-chain], v[:-chain]))
    return found


def _side_by_side(own: Tensor, parts: list[tuple[slice, Tensor]], width: int, filling: float) -> Tensor:
    """own [n, r, K] after the parts [., r, W] of their rows; `filling` where no part is."""
    if not width:
        return own
    if len(parts) == 1 and len(parts[0][1]) == len(own):
        return torch.cat([parts[0][1], own], dim=-1)
    both = own.new_empty(*own.shape[:2], width + own.shape[-1])
    both[..., width:] = own
    covered = 0
    for rows, part in parts:
        both[covered : rows.start, :, :width] = filling
        both[rows, :, :width] = part
        covered = rows.stop
    both[covered:, :, :width] = filling
    return both


def _weights(own: Tensor, parts: list[tuple[slice, Tensor]], width: int, mask: Tensor | None) -> Tensor:
    """Softmax, in float32 or better, of scores over [before, own]."""
    scores = _side_by_side(own, parts, width, -torch.inf)
    scores = scores.float() if scores.dtype == torch.bfloat16 else scores
    if mask is not None:
        by_row = scores if mask.ndim == 2 else scores.unflatten(0, (len(mask), -1))
        by_row[..., scores.shape[-1] - mask.shape[-1] :].masked_fill_(mask, -torch.inf)
    return torch.softmax(scores, dim=-1)


class _WindowAttention(torch.autograd.Function):
    """Heads are merged with rows: q, q_before [n, L, d], k [n, K, d], v [n, K, e], before [., W, .]."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        q_before: Tensor | None,
        k: Tensor,
        v: Tensor,
        before_k: Tensor | None,
        before_v: Tensor | None,
        visible: Visible,
        chain: int,
    ) -> Tensor:
        offset = None if isinstance(visible.offset, int) else visible.offset
        ctx.save_for_backward(q, q_before, k, v, before_k, before_v, visible.first, offset)
        ctx.offset, ctx.chain = visible.offset if offset is None else None, chain
        befores = _befores(k, v, before_k, before_v, chain)
        width = befores[0].keys.shape[1] if befores else 0
        turned = q if q_before is None else q_before
        out = v.new_empty(*q.shape[:2], v.shape[-1])
        for rows, keys, mask in visible.strips(q.shape[1], k.shape[1], width, q.device):
            own = torch.bmm(q[:, rows], k[:, :keys].mT)
            parts = [(b.rows, torch.bmm(turned[b.rows, rows], b.keys.mT)) for b in befores]
            weights = _weights(own, parts, width, mask).to(v.dtype)
            strip = torch.bmm(weights[..., width:], v[:, :keys])
            for b in befores:
                strip[b.rows].baddbmm_(weights[b.rows, :, :width], b.values)
            out[:, rows] = strip
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        q, q_before, k, v, before_k, before_v, first, offset = ctx.saved_tensors
        visible = Visible(ctx.offset if offset is None else offset, first)
        befores = _befores(k, v, before_k, before_v, ctx.chain)
        width = befores[0].keys.shape[1] if befores else 0
        turned = q if q_before is None else q_before
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        d_turned = dq if q_before is None else torch.zeros_like(q_before)
        d_before_k, d_before_v = (None if x is None else torch.zeros_like(x) for x in (before_k, before_v))
        d_befores = _befores(dk, dv, d_before_k, d_before_v, ctx.chain)
        written = 0  # own keys that have a gradient: the last strip needs most of them, so strips run backwards
        for rows, keys, mask in reversed(list(visible.strips(q.shape[1], k.shape[1], width, q.device))):
            q_s, k_s, v_s, grad_s = q[:, rows], k[:, :keys], v[:, :keys], grad[:, rows]
            parts = [(b.rows, torch.bmm(turned[b.rows, rows], b.keys.mT)) for b in befores]
            weights = _weights(torch.bmm(q_s, k_s.mT), parts, width, mask)
            parts = [(b.rows, torch.bmm(grad_s[b.rows], b.values.mT)) for b in befores]
            d_weights = _side_by_side(torch.bmm(grad_s, v_s.mT), parts, width, 0).to(weights.dtype)
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype).to(q.dtype)
            weights = weights.to(grad.dtype)
            dq[:, rows] = torch.bmm(d_scores[..., width:], k_s)
            own = (dv, weights[..., width:], grad_s), (dk, d_scores[..., width:], q_s)
            for total, left, right in own:
                if written:
                    total[:, :keys].baddbmm_(left.mT, right)
                else:
                    total[:, :keys] = torch.bmm(left.mT, right)
                    total[:, keys:] = 0
            for b, d in zip(befores, d_befores, strict=True):
                d_scores_b = d_scores[b.rows, :, :width]
                d_turned[b.rows, rows].baddbmm_(d_scores_b, b.keys)
                d.keys.baddbmm_(d_scores_b.mT, turned[b.rows, rows])
                d.values.baddbmm_(weights[b.rows, :, :width].mT, grad_s[b.rows])
            written = max(written, keys)
        return dq, None if q_before is None else d_turned, dk, dv, d_before_k, d_before_v, None, None


def two_chunk_attention(
    q: Tensor,
    q_before: Tensor | None,
    k: Tensor,
    v: Tensor,
    before: tuple[Tensor, Tensor] | None,
    visible: Visible = Visible(),  # noqa: B008 - a value
    dropout: float = 0.0,
    dropkey: bool = False,
    chain: int = 0,
) -> Tensor:
    """Attention of each query over the chunk before its own and the keys of its own that precede it.

    Scores are not scaled; softmax in float32 or better.

    Args:
        q: [N, L, H, d]; queries for the keys of their own chunk.
        q_before: [N, L, H, d]; queries for the keys of the chunk before. None: q.
        k: [N, K, H, d]; v: [N, K, H, e]; their own chunk, K >= L + offset.
        before: keys [n, W, H, d] and values [n, W, H, e] of the chunk before that of the first n rows. None: no row has
            one, unless they are chained.
        visible: where queries stand, and what is hidden from them.
        dropout: probability, applied in training mode by the caller's choice to pass it.
        dropkey: drop keys before the softmax, in place of weights after it.
        chain: rows of one chunk, where rows are chunks one after another (then K = L = W and the offset is 0): the
            chunk before row i is row `i - chain`. `before`, if any, holds that of the first `chain` rows. 0: they are
            not chained.

    Returns:
        [N, L, H, e] in the dtype of v.
    """
    dtype, wide = v.dtype, matmul_dtype(v)
    merged = [None if x is None else x.to(wide).transpose(1, 2) for x in (q, q_before, k, v, *(before or (None, None)))]
    q_, q_before_, k_, v_, before_k, before_v = merged
    assert q_ is not None and k_ is not None and v_ is not None
    shape = q_.shape[:2]
    plain = isinstance(visible.offset, int) and visible.first is None
    if dropout > 0:
        turned = q_ if q_before_ is None else q_before_
        out = _with_dropout(q_, turned, k_, v_, (before_k, before_v), visible, dropout, dropkey, chain)
    elif q_.shape[2] == 1 and plain and chain == 0 and (before_k is None or len(before_k) == len(q_)):
        out = _one_query(q_, q_before_, k_, v_, before_k, before_v, visible)
    else:
        flat = [None if x is None else x.flatten(0, 1) for x in (q_, q_before_, k_, v_, before_k, before_v)]
        out = _WindowAttention.apply(*flat, visible, chain * shape[1]).unflatten(0, shape)
    return out.transpose(1, 2).to(dtype)


def _one_query(
    q: Tensor,
    q_before: Tensor | None,
    k: Tensor,
    v: Tensor,
    before_k: Tensor | None,
    before_v: Tensor | None,
    visible: Visible,
) -> Tensor:
    """One query a row, [N, H, 1, d]; nothing but places yet to come is hidden."""
    assert isinstance(visible.offset, int)
    seen, full = visible.offset + 1, full_precision(q.dtype)
    exact = full if q.device.type == "cpu" else q.dtype  # there, a row of scores is quickest in float32
    scores = torch.matmul(q.to(exact), k[:, :, :seen].to(exact).mT)
    width = 0
    if before_k is not None:
        turned, width = q if q_before is None else q_before, before_k.shape[2]
        scores = torch.cat([torch.matmul(turned.to(exact), before_k.to(exact).mT), scores], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=full).to(v.dtype)
    out = weighted_sum(weights[..., width:], v[:, :, :seen])
    return out if before_v is None else out + weighted_sum(weights[..., :width], before_v)


def _with_dropout(
    q: Tensor,
    q_before: Tensor,
    k: Tensor,
    v: Tensor,
    before: tuple[Tensor | None, Tensor | None],
    visible: Visible,
    dropout: float,
    dropkey: bool,
    chain: int,
) -> Tensor:
    """Whole score matrices, differentiated by autograd: what is dropped must be the same in both passes."""
    befores = _befores(k, v, *before, chain)
    width = befores[0].keys.shape[2] if befores else 0
    keys_before, values_before = (
        torch.cat([x.new_zeros(len(q) - sum(len(p) for p in parts), x.shape[1], width, x.shape[3]), *parts])
        for x, parts in ((k, [b.keys for b in befores]), (v, [b.values for b in befores]))
    )
    absent = len(q) - sum(len(b.keys) for b in befores)  # the first rows: they have nothing before them
    outputs = []
    for rows, keys, mask in visible.strips(q.shape[2], k.shape[2], width, q.device):
        own = torch.matmul(q[:, :, rows], k[:, :, :keys].mT)
        scores = torch.cat([torch.matmul(q_before[:, :, rows], keys_before.mT), own], dim=-1)
        scores = scores.float() if scores.dtype == torch.bfloat16 else scores
        unseen = torch.zeros(scores.shape, dtype=torch.bool, device=q.device)
        if mask is not None:
            unseen[..., scores.shape[-1] - mask.shape[-1] :] |= mask
        unseen[:absent, ..., :width] = True
        if dropkey:
            offset = visible.offset if isinstance(visible.offset, int) else visible.offset[:, None, None, None]
            self_ = torch.arange(rows.start, rows.stop, device=q.device)[:, None] + offset + width
            unseen |= (torch.rand_like(scores) < dropout) & (torch.arange(scores.shape[-1], device=q.device) != self_)
        weights = torch.softmax(scores.masked_fill(unseen, -torch.inf), dim=-1)
        if not dropkey:
            weights = F.dropout(weights, dropout)
        weights = weights.to(v.dtype)
        outputs.append(weights[..., :width] @ values_before + weights[..., width:] @ v[:, :, :keys])
    return torch.cat(outputs, dim=-2)
