"""Attention over two chunks of keys, the one before and the query's own: the dense core of sliding chunk attention.

Queries are taken in strips of rows, as in `chunk_attention.causal`: scores exist for one strip at a time and are made
anew in the backward pass. A query has two forms, one for each chunk of keys, because a rotation only knows the place in
a chunk. Whole chunks come one after another, so that the keys before one chunk are those of another: they are never
copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megalodon.ops.backend import full_precision, matmul_dtype
from megalodon.ops.chunk_attention.causal import STRIP, weighted_sum
from megalodon.ops.tiles import teams


class Visible(NamedTuple):
    """What queries may see, in a frame where the W keys before come first, then the query's own chunk.

    Attributes:
        offset: int, or int64 [N] where it differs by row; query i stands at place `i + offset` of its own chunk.
        first: int64 [N, L]; the first key of the frame that each query may see. None: 0.
    """

    offset: int | Tensor = 0
    first: Tensor | None = None

    @property
    def by_row(self) -> int | None:
        """How many rows differ; None: none."""
        if self.first is not None:
            return len(self.first)
        return None if isinstance(self.offset, int) else len(self.offset)

    def of_rows(self, rows: slice, unit: int) -> Visible:
        """That of some rows, each of which counts `unit` times."""
        part = slice(rows.start // unit, rows.stop // unit)
        offset = self.offset if isinstance(self.offset, int) else self.offset[part]
        return Visible(offset, None if self.first is None else self.first[part])

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


AT_ONCE = 1 << 21
"""Values of own keys that a CPU works on together: scores of a strip exist for so many at a time."""


def _groups(
    k: Tensor, v: Tensor, befores: list[Before], visible: Visible
) -> Iterator[tuple[slice, list[Before], Visible]]:
    """Rows that are worked on together, with what they see before their chunk, and how."""
    edges = {0, len(k), *(edge for before in befores for edge in (before.rows.start, before.rows.stop))}
    unit = 1 if visible.by_row is None else len(k) // visible.by_row  # heads of a row have its mask
    for start, stop in pairwise(sorted(edges)):
        count, most = (stop - start) // unit, AT_ONCE // max(v[0].numel(), 1) // unit
        for begin, end in teams(count, most) if v.device.type == "cpu" else ((0, count),):
            rows = slice(start + unit * begin, start + unit * end)
            first, seen = rows.start, []
            for before in befores:
                if before.rows.start <= first < before.rows.stop:
                    part = slice(first - before.rows.start, rows.stop - before.rows.start)
                    seen.append(Before(slice(0, rows.stop - first), before.keys[part], before.values[part]))
            own = visible.of_rows(rows, unit)
            if not seen and befores and own.first is not None:  # their frame has no chunk before
                own = own._replace(first=own.first - befores[0].keys.shape[1])
            yield rows, seen, own


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
        turned = q if q_before is None else q_before
        out = v.new_empty(*q.shape[:2], v.shape[-1])
        for n, befores, seen in _groups(k, v, _befores(k, v, before_k, before_v, chain), visible):
            _forward(q[n], turned[n], k[n], v[n], befores, seen, out[n])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        q, q_before, k, v, before_k, before_v, first, offset = ctx.saved_tensors
        visible = Visible(ctx.offset if offset is None else offset, first)
        turned = q if q_before is None else q_before
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        d_turned = dq if q_before is None else torch.empty_like(q_before)
        d_before_k, d_before_v = (None if x is None else torch.zeros_like(x) for x in (before_k, before_v))
        befores = _befores(k, v, before_k, before_v, ctx.chain)
        d_befores = _befores(dk, dv, d_before_k, d_before_v, ctx.chain)
        groups = _groups(k, v, befores, visible), _groups(k, v, d_befores, visible)
        for (n, seen_before, seen), (_, totals, _) in zip(*groups, strict=True):
            gradients = dq[n], None if q_before is None else d_turned[n], dk[n], dv[n]
            _backward(grad[n], q[n], turned[n], k[n], v[n], seen_before, seen, gradients, totals)
        return dq, None if q_before is None else d_turned, dk, dv, d_before_k, d_before_v, None, None


def _forward(
    q: Tensor, turned: Tensor, k: Tensor, v: Tensor, befores: list[Before], visible: Visible, out: Tensor
) -> None:
    """Of rows that all see a chunk before, or none of which does, into out [n, L, e]."""
    width = befores[0].keys.shape[1] if befores else 0
    for rows, keys, mask in visible.strips(q.shape[1], k.shape[1], width, q.device):
        parts = [(b.rows, torch.bmm(turned[:, rows], b.keys.mT)) for b in befores]
        weights = _weights(torch.bmm(q[:, rows], k[:, :keys].mT), parts, width, mask).to(v.dtype)
        strip = torch.bmm(weights[..., width:], v[:, :keys])
        for b in befores:
            strip.baddbmm_(weights[..., :width], b.values)
        out[:, rows] = strip


def _backward(
    grad: Tensor,
    q: Tensor,
    turned: Tensor,
    k: Tensor,
    v: Tensor,
    befores: list[Before],
    visible: Visible,
    gradients: tuple[Tensor, Tensor | None, Tensor, Tensor],
    totals: list[Before],
) -> None:
    """The gradients of the same rows: those of queries are written, those of keys and values added to."""
    width = befores[0].keys.shape[1] if befores else 0
    dq, d_turned, dk, dv = gradients
    if d_turned is not None and not befores:
        d_turned.zero_()
    for rows, keys, mask in visible.strips(q.shape[1], k.shape[1], width, q.device):
        q_s, k_s, grad_s = q[:, rows], k[:, :keys], grad[:, rows]
        parts = [(b.rows, torch.bmm(turned[:, rows], b.keys.mT)) for b in befores]
        weights = _weights(torch.bmm(q_s, k_s.mT), parts, width, mask)
        parts = [(b.rows, torch.bmm(grad_s, b.values.mT)) for b in befores]
        d_weights = _side_by_side(torch.bmm(grad_s, v[:, :keys].mT), parts, width, 0).to(weights.dtype)
        d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype).to(q.dtype)
        weights = weights.to(grad.dtype)
        own, before = d_scores[..., width:], d_scores[..., :width]
        d_query = torch.bmm(own, k_s)
        dv[:, :keys].baddbmm_(weights[..., width:].mT, grad_s)
        dk[:, :keys].baddbmm_(own.mT, q_s)
        for b, d in zip(befores, totals, strict=True):
            if d_turned is None:
                d_query.baddbmm_(before, b.keys)
            else:
                d_turned[:, rows] = torch.bmm(before, b.keys)
            d.keys.baddbmm_(before.mT, turned[:, rows])
            d.values.baddbmm_(weights[..., :width].mT, grad_s)
        dq[:, rows] = d_query


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
