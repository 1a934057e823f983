"""Documents cut into pieces, as tables that the GPU kernels walk: no token is moved, whatever the packing.

A piece is a run of consecutive tokens of one document in one row. The first document of a row continues the row's
state; every later one starts afresh. Two operators cut the same way and differ in how long a piece may be.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megalodon.ops.layout import Layout

GROUP = 16
"""Pieces that one program of the CEMA kernels takes side by side: the rows of a tensor-core tile."""


class Pieces(NamedTuple):
    """Tables of n pieces; int32.

    Attributes:
        runs: [n, 4]; first token (of B*L), tokens, 1 where the piece starts a fresh document, and the row that the
            piece ends, or -1. Row by row, in order.
        rows: [B, 2]; the first piece of each row and how many there are.
        order: [groups * GROUP]; the pieces by falling length, filled up with -1.
        chained: whether some document has several pieces.
        padding: whether some token is in no piece.
    """

    runs: Tensor
    rows: Tensor
    order: Tensor
    chained: bool
    padding: bool


def pieces_of(layout: Layout, longest: int, unit: int) -> Pieces:
    """The pieces of a batch.

    Args:
        longest: most tokens in a piece; a multiple of `unit`.
        unit: every piece but a document's first is a multiple of it, and a first piece that is not is shorter than it.
    """
    if layout.plain:
        return _plain(layout.batch, layout.length, longest, unit, layout.device)
    cache = layout.__dict__.setdefault("_pieces", {})
    if (longest, unit) not in cache:
        cache[longest, unit] = _cut(*_documents(layout), layout.batch, longest, unit, layout.device, layout.length)
    return cache[longest, unit]


@lru_cache(maxsize=64)
def _plain(batch: int, length: int, longest: int, unit: int, device: torch.device) -> Pieces:
    rows = np.arange(batch if length else 0)
    return _cut(rows, rows * length, np.full(len(rows), length), rows < 0, batch, longest, unit, device, length)


def _documents(layout: Layout) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(row, first token, tokens, fresh) of each document, in order."""
    index = np.arange(layout.length)
    begins = (index == 0) & (layout.lengths > 0)[:, None]
    if layout.starts is not None:
        begins = begins | layout.starts
    row, first = np.nonzero(begins)
    last_of_row = np.append(row[1:] != row[:-1], True)[: len(row)]
    ends = np.where(last_of_row, layout.lengths[row], np.append(first[1:], 0)[: len(row)])
    return row, row * layout.length + first, ends - first, first > 0


def _cut(
    row: np.ndarray,
    first: np.ndarray,
    tokens: np.ndarray,
    fresh: np.ndarray,
    batch: int,
    longest: int,
    unit: int,
    device: torch.device,
    width: int,
) -> Pieces:
    head = tokens % unit
    whole = -(-(tokens - head) // longest)
    count = whole + (head > 0)
    document = np.repeat(np.arange(len(row)), count)
    number = np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)
    h, with_head = head[document], head[document] > 0
    is_head = with_head & (number == 0)
    start = np.where(is_head, 0, h + (number - with_head) * longest)
    length = np.where(is_head, h, np.minimum(longest, tokens[document] - start))
    piece_row = row[document]
    ends = np.where(np.append(piece_row[1:] != piece_row[:-1], True)[: len(piece_row)], piece_row, -1)
    runs = np.stack([first[document] + start, length, (number == 0) & fresh[document], ends], axis=1)
    per_row = np.bincount(piece_row, minlength=batch)
    order = np.full(max(-(-len(runs) // GROUP), 1) * GROUP, -1)
    order[: len(runs)] = np.argsort(-length, kind="stable")
    tables = (runs.reshape(-1, 4), np.stack([np.cumsum(per_row) - per_row, per_row], axis=1), order)
    on_device = [torch.from_numpy(t.astype(np.int32)).to(device) for t in tables]
    return Pieces(
        runs=on_device[0],
        rows=on_device[1],
        order=on_device[2],
        chained=bool((count > 1).any()),
        padding=int(tokens.sum()) < batch * width,
    )
