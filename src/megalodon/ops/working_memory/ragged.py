"""The working memory of batches whose rows differ: packed documents, padding, rows at different places."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megalodon.ops.layout import Layout
from megalodon.ops.prefix import Prefix
from megalodon.ops.segments import Segments
from megalodon.ops.tiles import move_rows, ranges
from megalodon.ops.working_memory.scan import absorb, read

Pair = tuple[Tensor, Tensor]
"""(from, to), int64 each."""


class Readers(NamedTuple):
    """Spans of tokens, one chunk of one document each, of like length.

    Attributes:
        width: the most tokens in one.
        token: tokens of B*L to slots of spans*width.
        memory: int64 [spans]; what each reads: a row's carried memory, or the memory after an absorbed chunk.
        carried: which of the two.
    """

    width: int
    token: Pair
    memory: Tensor
    carried: bool


class Tables(NamedTuple):
    """How a ragged batch absorbs and reads.

    Attributes:
        steps: how many documents absorb a chunk in each step, the longest first; T chunks in all.
        rows: int64 [K]; the row of each such document. continues: bool [K]; the row's first, which goes on.
        token, open, before: what the chunks are made of: tokens of B*L, cached keys of B*w and B*C, to slots of T*C.
        end: int64 [T]; the chunk's last token, of B*L, or -1 where it is the row's carried chunk. chunk: its number.
        row: int64 [T]; its row.
        last: rows that end with a memory after an absorbed chunk: (chunks of T, rows of B).
        stays: bool [B]; rows that end with the memory they came with.
        readers: the spans that read.
    """

    steps: list[int]
    rows: Tensor
    continues: Tensor
    token: Pair
    open: Pair
    before: Pair
    end: Tensor
    chunk: Tensor
    row: Tensor
    last: Pair
    stays: Tensor
    readers: list[Readers]


def tables_of(layout: Layout) -> Tables:
    """Made once for all layers."""
    if "_memory_tables" not in layout.__dict__:
        layout.__dict__["_memory_tables"] = _tables(layout)
    return layout.__dict__["_memory_tables"]


def _tables(layout: Layout) -> Tables:
    size, length, device = layout.chunk_size, layout.length, layout.device
    assert size is not None

    def tensor(x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(device)

    def pair(source: np.ndarray, target: np.ndarray, counts: np.ndarray) -> Pair:
        return tensor(ranges(source, counts)), tensor(ranges(target, counts))

    # documents: row, first token, tokens, position of the first token
    begins = (np.arange(length) == 0) & (layout.lengths > 0)[:, None]
    if layout.starts is not None:
        begins = begins | layout.starts
    row, first = np.nonzero(begins)
    ends_row = np.append(row[1:] != row[:-1], True)[: len(row)]
    stop = np.where(ends_row, layout.lengths[row], np.append(first[1:], 0)[: len(row)])
    position = np.where(first == 0, layout.positions[row], 0)
    chunk = position // size
    absorbing = np.maximum((position + stop - first) // size - np.maximum(chunk, 1), 0)

    order = np.argsort(-absorbing, kind="stable")
    order = order[absorbing[order] > 0]
    steps = [int((absorbing > s).sum()) for s in range(int(absorbing.max(initial=0)))]
    begin_of_step = np.concatenate([[0], np.cumsum(steps)]).astype(np.int64)
    document = np.concatenate([order[:n] for n in steps]) if steps else np.zeros(0, dtype=np.int64)
    step = np.repeat(np.arange(len(steps)), steps)
    rank = np.zeros(len(row), dtype=np.int64)
    rank[order] = np.arange(len(order))

    number = np.maximum(chunk[document] - 1, 0) + step  # of the absorbed chunk, in its document
    start = number * size - position[document]  # its first token, counted from the document's first in the batch
    of_row, slots = row[document], np.arange(len(document)) * size
    from_before = np.where(start + size <= -(position[document] % size), size, 0)
    from_open = np.where(from_before > 0, 0, np.clip(-start, 0, size))
    from_tokens = size - from_before - from_open
    source = of_row * length + first[document] + np.maximum(start, 0)
    end = np.where(from_before > 0, -1, of_row * length + first[document] + start + size - 1)

    final = ends_row & (absorbing > 0)
    last = begin_of_step[np.maximum(absorbing - 1, 0)] + rank
    stays = np.ones(layout.batch, dtype=bool)
    stays[row[ends_row & ((absorbing > 0) | (first > 0))]] = False
    return Tables(
        steps=steps,
        rows=tensor(row[order]),
        continues=tensor(first[order] == 0),
        token=pair(source, slots + from_open, from_tokens),
        open=pair(of_row * max(layout.longest_offset, 1), slots, from_open),
        before=pair(of_row * size, slots, from_before),
        end=tensor(end),
        chunk=tensor(number),
        row=tensor(of_row),
        last=(tensor(last[final]), tensor(row[final])),
        stays=tensor(stays),
        readers=list(_readers(layout, row * length + first, chunk, begin_of_step, rank, pair, tensor)),
    )


def _readers(
    layout: Layout,
    document_token: np.ndarray,
    document_chunk: np.ndarray,
    begin_of_step: np.ndarray,
    rank: np.ndarray,
    pair: Callable[[np.ndarray, np.ndarray, np.ndarray], Pair],
    tensor: Callable[[np.ndarray], Tensor],
) -> Iterator[Readers]:
    """The spans that have something to read, by what they read and how long they are."""
    size, length = layout.chunk_size, layout.length
    assert size is not None
    spans = layout.chunk_spans
    row, first, tokens = spans[:, 0], spans[:, 1], spans[:, 3]
    chunk = layout.document_positions[row, first] // size
    document = np.searchsorted(document_token, row * length + first, side="right") - 1
    absorbed = np.maximum(chunk - np.maximum(document_chunk[document], 1), 0)
    memory = np.where(absorbed > 0, begin_of_step[np.maximum(absorbed - 1, 0)] + rank[document], row)
    order = np.ceil(np.log2(np.maximum(tokens, 1))).astype(np.int64)
    for carried in (True, False):
        for o in np.unique(order):
            chosen = np.flatnonzero((chunk >= 2) & ((absorbed == 0) == carried) & (order == o))
            if len(chosen):
                width = int(tokens[chosen].max())
                token = pair(row[chosen] * length + first[chosen], np.arange(len(chosen)) * width, tokens[chosen])
                yield Readers(width, token, tensor(memory[chosen]), carried)


def ragged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory: Tensor,
    log_mass: Tensor,
    prefix: Prefix,
    layout: Layout,
    segments: Segments | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `megalodon.ops.working_memory`."""
    tables, total = tables_of(layout), q.shape[0] * q.shape[1]
    memories: Tensor | None = None
    stays = tables.stays[:, None, None]
    end_memory, end_mass = memory * stays[..., None], log_mass.masked_fill(~stays, -torch.inf)
    if tables.steps:
        memories, masses = _absorb(k, v, memory, log_mass, prefix, layout, segments, tables)
        end_memory = end_memory + move_rows(memories, *tables.last, layout.batch)
        end_mass = end_mass.index_copy(0, tables.last[1], masses[tables.last[0]])
    y = torch.zeros_like(v).flatten(0, 1)
    for readers in tables.readers:
        source = memory if readers.carried else memories
        assert source is not None
        queries = move_rows(q.flatten(0, 1), *readers.token, len(readers.memory) * readers.width)
        found = read(queries.unflatten(0, (-1, readers.width)), source[readers.memory]).flatten(0, 1)
        y = y + move_rows(found.to(v.dtype), readers.token[1], readers.token[0], total)
    y = y.unflatten(0, q.shape[:2])
    if segments is not None:
        y = y * segments.readable[..., None, None]
    return y, end_memory, end_mass


def _absorb(
    k: Tensor,
    v: Tensor,
    memory: Tensor,
    log_mass: Tensor,
    prefix: Prefix,
    layout: Layout,
    segments: Segments | None,
    tables: Tables,
) -> tuple[Tensor, Tensor]:
    """The memories and log masses after each chunk of the tables."""
    size, chunks = layout.chunk_size, len(tables.end)
    assert size is not None

    def gather(new: Tensor, which: int) -> Tensor:
        out = move_rows(new.flatten(0, 1), *tables.token, chunks * size)
        for cached, width, table in (
            (prefix.open, layout.longest_offset, tables.open),
            (prefix.before, size, tables.before),
        ):
            if table[0].numel():
                assert cached is not None
                rows = cached[which][:, :width].flatten(0, 1).to(new.dtype)
                out = out + move_rows(rows, *table, chunks * size)
        return out.unflatten(0, (chunks, size))

    goes_on = tables.continues[:, None, None]
    initial = memory[tables.rows] * goes_on[..., None]
    mass = log_mass[tables.rows].masked_fill(~goes_on, -torch.inf)
    live = keep = None
    if segments is not None:
        inside = segments.last.flatten()[tables.end.clamp(min=0)] - tables.chunk * size
        place = torch.where(tables.end < 0, segments.before[tables.row], inside)
        live, keep = torch.arange(size, device=k.device) >= place[:, None], place < 0
    return absorb(gather(k, 0), gather(v, 1), initial, mass, tables.steps, live, keep)
