"""Dense tiles that operators compute on, where a batch is ragged, and how tokens move there and back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _MoveRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, target: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(source, target)
        ctx.rows = x.shape[0]
        return x.new_zeros(rows, *x.shape[1:]).index_copy_(0, target, x.index_select(0, source))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        source, target = ctx.saved_tensors
        dx = grad.new_zeros(ctx.rows, *grad.shape[1:]).index_copy_(0, source, grad.index_select(0, target))
        return dx, None, None, None


def move_rows(x: Tensor, source: Tensor, target: Tensor, rows: int) -> Tensor:
    """A tensor of `rows` rows with `out[target] = x[source]` and zeros elsewhere; no row is named twice in either list.

    Args:
        x: [n, ...].
        source, target: int64 [m].
        rows: the length of the result's first dimension.
    """
    return _MoveRows.apply(x, source, target, rows)


def tokens_of(x: Tensor, start: int, stop: int) -> Tensor:
    """`x[:, start:stop]` of x [B, L, ...]; x itself where that is all of it, whose gradient then is not copied."""
    return x if start == 0 and stop == x.shape[1] else x[:, start:stop]


SINGLES = 8
"""Threads up to which one product of a batch is work enough for all of them."""


def teams(count: int, most: int) -> Iterator[tuple[int, int]]:
    """(first, last) of parts of a batch of `count` products, for a CPU: as many as its threads take in whole rounds,
    `most` at a time where that is enough for one round, then what is left over one by one.

    In a batch, each product has one thread; alone, it has them all. Three products as a batch take two threads as long
    as four do (PyTorch 2.13 with MKL).
    """
    threads = torch.get_num_threads()
    size = max(most // threads, 1) * threads
    whole = count // threads * threads if threads <= SINGLES else count
    for first in range(0, whole, size):
        yield first, min(first + size, whole)
    for first in range(whole, count):
        yield first, first + 1


@dataclass(frozen=True)
class Blocks:
    """Documents aligned to blocks of T tokens, n blocks a row.

    Attributes:
        count: n.
        source, target: int64 [m]; token `source` (of B*L) stands in slot `target` (of B*n*T).
        fresh: bool [B, n]; the block starts a document, so that no state enters it.
        tail: int64 [B]; the block that holds the row's last token (0 for an empty row).
        tail_source, tail_target: int64; the tokens of that block, moved to the end of a block of their own (of B*T).
        tail_length: int64 [B]; how many tokens that block holds.
    """

    count: int
    source: Tensor
    target: Tensor
    fresh: Tensor
    tail: Tensor
    tail_source: Tensor
    tail_target: Tensor
    tail_length: Tensor


@dataclass(frozen=True)
class Bins:
    """Spans packed into m rectangles of w slots. A slot holds a cached key, a token, or nothing.

    Attributes:
        shape: (m, w).
        token, slot: int64; token `token` (of B*L) stands in `slot` (of m*w).
        cached, cached_slot: int64; cached key `cached` (of B*n, n the width of the cache) stands in `cached_slot`.
        first: int64 [m, w]; the first slot of the slot's own span: what it may attend to begins there.
    """

    shape: tuple[int, int]
    token: Tensor
    slot: Tensor
    cached: Tensor
    cached_slot: Tensor
    first: Tensor


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The concatenation of `arange(start, start + length)` over pairs."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - lengths), lengths)


def first_fit_decreasing(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Pack items into bins: (bin of each item, its start inside the bin, number of bins)."""
    room = np.full(max(len(sizes), 1), capacity, dtype=np.int64)
    bin_of, start_of = np.zeros(len(sizes), dtype=np.int64), np.zeros(len(sizes), dtype=np.int64)
    for item in np.argsort(-sizes, kind="stable"):
        where = int(np.argmax(room >= sizes[item]))
        bin_of[item], start_of[item] = where, capacity - room[where]
        room[where] -= sizes[item]
    return bin_of, start_of, max(int(bin_of.max(initial=0)) + 1, 1)
