"""Causal attention over rectangles of keys: the dense core that chunk attention is arranged for.

Queries are taken in strips of rows. A strip needs only the keys up to its last row, so a chunk costs little more than
its causal half; scores exist for one strip at a time and are computed again in the backward pass, which costs little
because keys are narrow and values wide (q, k have 256 dimensions where v has 2048).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megalodon.ops import compiled
from megalodon.ops.backend import compiles, full_precision, matmul_dtype
from megalodon.ops.compiled.tables import CausalSoftmax
from megalodon.ops.gate import silu, silu_gradient

STRIP = 128
"""Rows of queries computed together."""

PARTS = 8
"""Parts of the keys that a single query's values are summed in."""

LEAST_PART = 4096
"""Numbers that make a part worth its own product."""


def hidden(rows: range, keys: int, offset: int | Tensor, first: Tensor | None, device: torch.device) -> Tensor | None:
    """bool, True where query `i` of `rows` may not see key `j` of `keys`: unless `first[i] <= j <= i + offset`.

    The mask covers the last `columns` keys of the strip, the only ones of which some are hidden: [rows, columns], or
    [N, 1, rows, keys] where offsets or firsts differ by row. None: nothing is hidden.
    """
    if first is None and isinstance(offset, int):
        begin = min(rows.start + offset + 1, keys)
        if begin == keys:
            return None
        return torch.ones(len(rows), keys - begin, dtype=torch.bool, device=device).triu()
    i = torch.arange(rows.start, rows.stop, device=device)[:, None]
    j = torch.arange(keys, device=device)
    mask = j > i + (offset if isinstance(offset, int) else offset[:, None, None, None])
    if first is not None:
        mask = mask | (j < first[:, None, rows.start : rows.stop, None])
    return mask


def _strips(
    q: Tensor, k: Tensor, offset: int | Tensor, first: Tensor | None
) -> Iterator[tuple[slice, int, Callable[[Tensor, Tensor], Tensor]]]:
    """(rows, number of keys they need, what makes weights of a strip's q and k) of each strip."""
    queries, keys = q.shape[-2], k.shape[-2]
    plain = first is None and isinstance(offset, int) and compiles(q, _SOFTMAX)
    for start in range(0, queries, STRIP):
        stop = min(start + STRIP, queries)
        needed = min(keys, stop + offset) if isinstance(offset, int) else keys
        if plain and isinstance(offset, int):
            yield slice(start, stop), needed, partial(_compiled_weights, seen=start + offset + 1)
            continue
        mask = hidden(range(start, stop), needed, offset, first, q.device)
        yield slice(start, stop), needed, partial(_weights, mask=mask)


_SOFTMAX = "tokens.causal_softmax"


def _compiled_weights(q: Tensor, k: Tensor, seen: int) -> Tensor:
    """`_weights` where query i of each strip sees the first `seen + i` keys."""
    scores = torch.bmm(q, k.transpose(1, 2))
    kernel, table = compiled.kernel(_SOFTMAX), np.zeros(len(CausalSoftmax), np.int64)
    assert kernel is not None, "`compiles` has asked for it"
    table[CausalSoftmax.matrices : CausalSoftmax.keys + 1] = scores.shape
    table[CausalSoftmax.seen], table[CausalSoftmax.scores] = seen, scores.data_ptr()
    kernel(table, scores.numel())
    return scores


def _weights(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax, in float32 or better, of the scores of one strip: [N H, rows, d] and [N H, keys, d]."""
    scores = torch.bmm(q, k.transpose(1, 2))
    scores = scores.float() if scores.dtype == torch.bfloat16 else scores
    if mask is not None:
        by_row = scores if mask.ndim == 2 else scores.unflatten(0, (len(mask), -1))
        by_row[..., scores.shape[-1] - mask.shape[-1] :].masked_fill_(mask, -torch.inf)
    return torch.softmax(scores, dim=-1)


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`out = a @ b`, in place where that is quick: batched products into strided memory are slow."""
    if out.is_contiguous():
        torch.bmm(a, b, out=out)
    else:
        out.copy_(torch.bmm(a, b))


class _CausalAttention(torch.autograd.Function):
    """Heads are merged with rows: q, k [N H, L, d], v [N H, K, e]; `activates`: the values are silu(v), which the
    backward pass makes anew."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, offset: int | Tensor, first: Tensor | None, activates: bool
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, first, None if isinstance(offset, int) else offset)
        ctx.offset = offset if isinstance(offset, int) else None
        ctx.activates, v = activates, silu(v) if activates else v
        out = v.new_empty(*q.shape[:2], v.shape[-1])
        for rows, keys, weigh in _strips(q, k, offset, first):
            weights = weigh(q[:, rows], k[:, :keys])
            _product(weights.to(v.dtype), v[:, :keys], out[:, rows])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        q, k, v, first, offset = ctx.saved_tensors
        offset = ctx.offset if offset is None else offset
        u, v = v, silu(v) if ctx.activates else v
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        written = 0  # keys that have a gradient: the last strip needs most of them, so strips run backwards
        for rows, keys, weigh in reversed(list(_strips(q, k, offset, first))):
            q_s, k_s, v_s, grad_s = q[:, rows], k[:, :keys], v[:, :keys], grad[:, rows]
            weights = weigh(q_s, k_s)
            d_weights = torch.bmm(grad_s, v_s.transpose(1, 2)).to(weights.dtype)
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype).to(q.dtype)
            _product(d_scores, k_s, dq[:, rows])
            for total, left, right in ((dv, weights.to(grad.dtype), grad_s), (dk, d_scores, q_s)):
                if written:
                    total[:, :keys].baddbmm_(left.transpose(1, 2), right)
                else:
                    _product(left.transpose(1, 2), right, total[:, :keys])
                    total[:, keys:] = 0
            written = max(written, keys)
        return dq, dk, silu_gradient(u, dv) if ctx.activates else dv, None, None, None


def weighted_sum(weights: Tensor, v: Tensor) -> Tensor:
    """`weights [N, H, 1, K] @ v [N, H, K, e]`.

    On a CPU, a product in float32 reads v with one thread for each row and head. Where those are few, keys are cut into
    parts, so that all threads read. (The bfloat16 products have threads of their own.)
    """
    rows, heads, keys, size = v.shape
    few = rows * heads < PARTS and keys // PARTS * size >= LEAST_PART
    if not few or v.device.type != "cpu" or v.dtype == torch.bfloat16:
        return torch.matmul(weights, v)
    whole = keys // PARTS * PARTS
    sums = []
    for row in range(rows):
        for head in range(heads):
            w, x = weights[row, head], v[row, head]
            parts = w[:, :whole].view(PARTS, 1, -1)
            total = torch.bmm(parts, x[:whole].view(PARTS, -1, size)).sum(0)
            sums.append(total if whole == keys else total.addmm_(w[:, whole:], x[whole:]))
    return torch.stack(sums).view(rows, heads, 1, size)


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offset: int | Tensor = 0,
    first: Tensor | None = None,
    dropout: float = 0.0,
    dropkey: bool = False,
    activates: bool = False,
) -> Tensor:
    """Attention of each query over the keys that precede it; scores are not scaled; softmax in float32 or better.

    Args:
        q: [N, L, H, d]; query i stands at key position `i + offset`.
        k: [N, K, H, d]; v: [N, K, H, e]; K >= L + offset.
        offset: int, or int64 [N] where it differs by row.
        first: int64 [N, L]; the first key each query may see. None: 0.
        dropout: probability, applied in training mode by the caller's choice to pass it.
        dropkey: drop keys before the softmax, in place of weights after it.
        activates: the values are silu(v); less is kept for the backward pass than of values made before.

    Returns:
        [N, L, H, e] in the dtype of v.
    """
    if activates and (dropout > 0 or q.shape[1] == 1 or v.dtype != matmul_dtype(v)):
        v, activates = silu(v), False
    dtype, wide = v.dtype, matmul_dtype(v)
    q, k, v = (x.to(wide).transpose(1, 2) for x in (q, k, v))
    if dropout == 0 and q.shape[2] == 1 and first is None and isinstance(offset, int):
        full = full_precision(wide)
        exact = full if q.device.type == "cpu" else wide  # there, a row of scores is quickest in float32
        scores = torch.matmul(q.to(exact), k[:, :, : offset + 1].to(exact).transpose(2, 3))
        weights = torch.softmax(scores, dim=-1, dtype=full)
        out = weighted_sum(weights.to(wide), v[:, :, : offset + 1])
    elif dropout > 0:
        out = _with_dropout(q, k, v, offset, first, dropout, dropkey)
    else:
        out = _CausalAttention.apply(*(x.flatten(0, 1) for x in (q, k, v)), offset, first, activates)
        out = out.unflatten(0, q.shape[:2])
    return out.transpose(1, 2).to(dtype)


def _with_dropout(
    q: Tensor, k: Tensor, v: Tensor, offset: int | Tensor, first: Tensor | None, dropout: float, dropkey: bool
) -> Tensor:
    """Whole score matrices, differentiated by autograd: what is dropped must be the same in both passes."""
    outputs = []
    for start in range(0, q.shape[2], STRIP):
        rows = slice(start, min(start + STRIP, q.shape[2]))
        keys = min(k.shape[2], rows.stop + offset) if isinstance(offset, int) else k.shape[2]
        mask = hidden(range(rows.start, rows.stop), keys, offset, first, q.device)
        scores = torch.matmul(q[..., rows, :], k[..., :keys, :].transpose(-1, -2))
        scores = scores.float() if scores.dtype == torch.bfloat16 else scores
        unseen = torch.zeros(scores.shape, dtype=torch.bool, device=q.device)
        if mask is not None:
            unseen[..., keys - mask.shape[-1] :] |= mask
        if dropkey:
            own = torch.arange(rows.start, rows.stop, device=q.device)[:, None] + (
                offset if isinstance(offset, int) else offset[:, None, None, None]
            )
            unseen |= (torch.rand_like(scores) < dropout) & (torch.arange(keys, device=q.device) != own)
        weights = torch.softmax(scores.masked_fill(unseen, -torch.inf), dim=-1)
        if not dropkey:
            weights = F.dropout(weights, dropout)
        outputs.append(torch.matmul(weights.to(v.dtype), v[..., :keys, :]))
    return torch.cat(outputs, dim=-2)
