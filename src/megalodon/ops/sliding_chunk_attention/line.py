"""Sliding chunk attention of whole chunks in a row on a CPU, one product after another.

A chunk and the one before it lie side by side in the text, so that a strip of queries needs one product with the values
of both, where they are; nothing is copied, and each product has all threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalodon.ops.chunk_attention.causal import STRIP

WORTHWHILE = 1 << 17
"""Numbers in a chunk's values that make its products worth all threads."""


def fits(v: Tensor, chunk_size: int) -> bool:
    """Whether values [B, L, H, e] of whole chunks are best taken so."""
    wide = v.dtype in (torch.float32, torch.float64)
    return v.device.type == "cpu" and wide and chunk_size * v.shape[-1] >= WORTHWHILE


class _Strip(NamedTuple):
    """Queries of one chunk, and the keys that they see: `before` of the chunk before, then `own`."""

    rows: slice
    before: slice
    own: slice

    @property
    def both(self) -> slice:
        return slice(self.before.start, self.own.stop)

    @property
    def width(self) -> int:
        return self.before.stop - self.before.start


def _strips(length: int, chunk: int, lead: int) -> Iterator[_Strip]:
    """Of `length` queries, whose keys come after `lead` keys of the chunk before the first."""
    for first in range(0, length, chunk):
        own = lead + first
        for start in range(0, chunk, STRIP):
            stop = min(start + STRIP, chunk)
            before = slice(max(own - chunk, 0), own)
            yield _Strip(slice(first + start, first + stop), before, slice(own, own + stop))


def _weights(q: Tensor, turned: Tensor, k: Tensor, strip: _Strip, hidden: Tensor) -> Tensor:
    """[rows, keys]; the softmax of a strip's scores over both chunks."""
    rows, width = strip.rows.stop - strip.rows.start, strip.width
    scores = q.new_empty(rows, strip.both.stop - strip.both.start)
    if width:
        torch.mm(turned[strip.rows], k[strip.before].T, out=scores[:, :width])
    torch.mm(q[strip.rows], k[strip.own].T, out=scores[:, width:])
    scores[:, -rows:].masked_fill_(hidden[:rows, :rows], -torch.inf)
    return torch.softmax(scores, dim=-1)


def _lines(*tensors: Tensor | None) -> Iterator[list[Any]]:
    """Each row and head of tensors [B, L, H, .] as [L, .]; None stays None."""
    first = next(x for x in tensors if x is not None)
    for row in range(first.shape[0]):
        for head in range(first.shape[2]):
            yield [None if x is None else x[row, :, head] for x in tensors]


class _LineAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, turned: Tensor | None, k: Tensor, v: Tensor, chunk: int) -> Tensor:
        ctx.save_for_backward(q, turned, k, v)
        ctx.chunk = chunk
        out, hidden = v.new_empty(*q.shape[:3], v.shape[-1]), _hidden(q)
        for q_, turned_, k_, v_, out_ in _lines(q, q if turned is None else turned, k, v, out):
            for strip in _strips(q.shape[1], chunk, k.shape[1] - q.shape[1]):
                weights = _weights(q_, turned_, k_, strip, hidden)
                torch.mm(weights, v_[strip.both], out=out_[strip.rows])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        q, turned, k, v = ctx.saved_tensors
        dq, dk, dv, hidden = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v), _hidden(q)
        d_turned = None if turned is None else torch.empty_like(turned)
        tensors = (q, q if turned is None else turned, k, v, grad, dq, d_turned, dk, dv)
        for q_, turned_, k_, v_, grad_, dq_, d_turned_, dk_, dv_ in _lines(*tensors):
            for strip in _strips(q.shape[1], ctx.chunk, k.shape[1] - q.shape[1]):
                rows, width = strip.rows, strip.width
                weights = _weights(q_, turned_, k_, strip, hidden)
                d_weights = torch.mm(grad_[rows], v_[strip.both].T)
                d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
                dv_[strip.both].addmm_(weights.T, grad_[rows])
                own, before = d_scores[:, width:], d_scores[:, :width]
                torch.mm(own, k_[strip.own], out=dq_[rows])
                dk_[strip.own].addmm_(own.T, q_[rows])
                if width:
                    dk_[strip.before].addmm_(before.T, turned_[rows])
                    if d_turned_ is None:
                        dq_[rows].addmm_(before, k_[strip.before])
                    else:
                        torch.mm(before, k_[strip.before], out=d_turned_[rows])
                elif d_turned_ is not None:
                    d_turned_[rows] = 0
        return dq, d_turned, dk, dv, None


def _hidden(q: Tensor) -> Tensor:
    """bool [STRIP, STRIP]: which of a strip's own keys each of its queries may not see."""
    return torch.ones(STRIP, STRIP, dtype=torch.bool, device=q.device).triu(1)


def line_attention(q: Tensor, q_before: Tensor | None, k: Tensor, v: Tensor, chunk_size: int) -> Tensor:
    """Attention of each query over the chunk before its own and the keys of its own that precede it.

    Args:
        q: [B, L, H, d]; queries of whole chunks, for the keys of their own. q_before: those for the chunk before, or
            None where they are the same.
        k: [B, W + L, H, d]; v: [B, W + L, H, e]; W is the chunk size where a chunk comes before the first, else 0.

    Returns:
        [B, L, H, e].
    """
    return _LineAttention.apply(q, q_before, k, v, chunk_size)
