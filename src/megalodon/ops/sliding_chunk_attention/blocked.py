"""Sliding chunk attention as a few dense rectangles.

Rows at one common place give at most three: what completes the open chunk, the whole chunks, the rest. Anything else
(packed documents, padding, rows at different places) is cut into spans, each one chunk of one document: those that see
no chunk before go through the layout's bins, the others side by side, those of like length together.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megalodon.ops.chunk_attention.causal import causal_attention
from megalodon.ops.layout import Layout, ranges
from megalodon.ops.layout import move_rows as move
from megalodon.ops.segments import Segments
from megalodon.ops.prefix import Prefix
from megalodon.ops.sliding_chunk_attention.window import Visible, window_attention


def sliding_chunk_attention(
    q: Tensor,
    q_before: Tensor | None,
    k: Tensor,
    v: Tensor,
    prefix: Prefix,
    layout: Layout,
    segments: Segments | None,
    dropout: float,
    dropkey: bool,
) -> Tensor:
    """See `megalodon.ops.sliding_chunk_attention`."""
    with torch.autocast(q.device.type, enabled=False):
        if q.shape[1] == 0 or q.shape[0] == 0:
            return v
        size = layout.chunk_size
        assert size is not None
        has_before = layout.positions >= size
        if layout.uniform_offset is not None and has_before.all() == has_before.any():
            return _uniform(q, q_before, k, v, prefix, layout, segments, dropout, dropkey)
        return _ragged(q, q_before, k, v, prefix, layout, segments, dropout, dropkey)


def first_visible(layout: Layout, segments: Segments | None) -> Tensor | None:
    """int64 [B, L]: the first key each token sees, counted from the start of the chunk before its own. None: all."""
    if segments is None:
        return None
    size = layout.chunk_size
    assert size is not None
    return size + layout.token_positions % size + 1 - segments.reach


def _uniform(
    q: Tensor,
    q_before: Tensor | None,
    k: Tensor,
    v: Tensor,
    prefix: Prefix,
    layout: Layout,
    segments: Segments | None,
    dropout: float,
    dropkey: bool,
) -> Tensor:
    chunk, offset, length = layout.chunk_size, layout.uniform_offset, q.shape[1]
    assert chunk is not None and offset is not None
    first = first_visible(layout, segments)
    before = None
    if layout.positions[0] >= chunk:
        assert prefix.before is not None
        before = prefix.before[0].to(k.dtype), prefix.before[1].to(v.dtype)
    head = min(length, chunk - offset) if offset else 0
    whole = (length - head) // chunk * chunk

    def part(start: int, stop: int, own: tuple[Tensor, Tensor], place: int) -> Tensor:
        seen = None if first is None else first[:, start:stop] - (0 if before is not None else chunk)
        turned = None if q_before is None else q_before[:, start:stop]
        return window_attention(q[:, start:stop], turned, *own, before, Visible(place, seen), dropout, dropkey)

    outputs = []
    if head:
        assert prefix.open is not None
        own = (
            torch.cat([prefix.open[0][:, :offset].to(k.dtype), k[:, :head]], dim=1),
            torch.cat([prefix.open[1][:, :offset].to(v.dtype), v[:, :head]], dim=1),
        )
        outputs.append(part(0, head, own, offset))
        before = own
    if whole:
        span = slice(head, head + whole)
        # chunks come one after another, so that the keys before one are those of another
        queries, turned, keys, values, seen = (
            None if x is None else x[:, span].unflatten(1, (-1, chunk)).transpose(0, 1).flatten(0, 1)
            for x in (q, q_before, k, v, first)
        )
        assert queries is not None and keys is not None and values is not None
        if whole == chunk and before is None and seen is not None:
            seen = seen - chunk
        out = window_attention(
            queries, turned, keys, values, before, Visible(0, seen), dropout, dropkey, chain=q.shape[0]
        )
        outputs.append(out.unflatten(0, (-1, q.shape[0])).transpose(0, 1).flatten(1, 2))
        before = k[:, span][:, -chunk:], v[:, span][:, -chunk:]
    if head + whole < length:
        rest = slice(head + whole, length)
        outputs.append(part(rest.start, length, (k[:, rest], v[:, rest]), 0))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


class Sides(NamedTuple):
    """n spans side by side, all of which see a chunk before: tables of where their tokens and cached keys go.

    Pairs are (from, to), int64: tokens of B*L, cached keys of the open chunks of B*w and of the chunks before of B*C.

    Attributes:
        queries, own, before: the most of each in a span.
        query: tokens to slots of n*queries. token, cached: to slots of n*own, the span's own chunk.
        before_token, before_cached, before_before: to slots of n*before.
        offset: int64 [n]; the place of a span's first token in its chunk.
    """

    count: int
    queries: int
    own: int
    query: tuple[Tensor, Tensor]
    token: tuple[Tensor, Tensor]
    cached: tuple[Tensor, Tensor]
    before_token: tuple[Tensor, Tensor]
    before_cached: tuple[Tensor, Tensor]
    before_before: tuple[Tensor, Tensor]
    offset: Tensor


class Spans(NamedTuple):
    """The spans of a batch: those without a chunk before, and groups of those with one."""

    lone: np.ndarray
    groups: list[Sides]


def spans_of(layout: Layout) -> Spans:
    """Made once for all layers."""
    if "_window_spans" not in layout.__dict__:
        size = layout.chunk_size
        assert size is not None
        spans = layout.spans
        row, first = spans[:, 0], spans[:, 1]
        has_before = layout.document_positions[row, first] >= size
        tokens = spans[:, 3]
        order = np.ceil(np.log2(np.maximum(tokens, 1))).astype(np.int64)  # spans of like length
        groups = [_sides(layout, np.flatnonzero(has_before & (order == o))) for o in np.unique(order[has_before])]
        layout.__dict__["_window_spans"] = Spans(spans[~has_before], groups)
    return layout.__dict__["_window_spans"]


def _sides(layout: Layout, chosen: np.ndarray) -> Sides:
    size, device = layout.chunk_size, layout.device
    assert size is not None
    row, first, cached, tokens = layout.spans[chosen].T
    number, cache_width = np.arange(len(chosen)), max(layout.longest_offset, 1)
    queries, own = int(tokens.max()), int((cached + tokens).max())

    def pair(source: np.ndarray, target: np.ndarray, counts: np.ndarray) -> tuple[Tensor, Tensor]:
        return (
            torch.from_numpy(ranges(source, counts)).to(device),
            torch.from_numpy(ranges(target, counts)).to(device),
        )

    # The chunk before a span that begins inside the batch is the span before it, all of it tokens but for what the
    # open chunk held; before a row's first span, it is cached.
    leading = first == 0
    earlier = layout.spans[np.maximum(chosen - 1, 0)]
    inside = np.where(leading, 0, earlier[:, 3])
    held = np.where(leading, 0, earlier[:, 2])
    return Sides(
        count=len(chosen),
        queries=queries,
        own=own,
        query=pair(row * layout.length + first, number * queries, tokens),
        token=pair(row * layout.length + first, number * own + cached, tokens),
        cached=pair(row * cache_width, number * own, cached),
        before_token=pair(row * layout.length + first - inside, number * size + held, inside),
        before_cached=pair(row * cache_width, number * size, held),
        before_before=pair(row * size, number * size, np.where(leading, size, 0)),
        offset=torch.from_numpy(cached).to(device),
    )


def _ragged(
    q: Tensor,
    q_before: Tensor | None,
    k: Tensor,
    v: Tensor,
    prefix: Prefix,
    layout: Layout,
    segments: Segments | None,
    dropout: float,
    dropkey: bool,
) -> Tensor:
    spans, size, total = spans_of(layout), layout.chunk_size, q.shape[0] * q.shape[1]
    assert size is not None
    queries, turned, keys, values = (None if x is None else x.flatten(0, 1) for x in (q, q_before, k, v))
    assert queries is not None and keys is not None and values is not None
    first = first_visible(layout, segments)
    first = None if first is None else first.expand(q.shape[:2]).flatten()
    width = layout.longest_offset
    open_ = None if prefix.open is None or not width else [x[:, :width].flatten(0, 1) for x in prefix.open]
    before = None if prefix.before is None else [x.flatten(0, 1) for x in prefix.before]

    def gather(new: Tensor, which: int, tables: list[tuple[Tensor, Tensor]], slots: int) -> Tensor:
        """Keys (`which` 0) or values (1), new and cached, in their slots."""
        out = move(new, *tables[0], slots)
        for cached, table in zip((open_, before), tables[1:], strict=False):
            if table[0].numel():
                assert cached is not None
                out = out + move(cached[which].to(new.dtype), *table, slots)
        return out

    out = values.new_zeros(total, *v.shape[2:])
    if len(spans.lone):
        bins = layout.pack(spans.lone)
        slots = bins.shape[0] * bins.shape[1]
        tables = [(bins.token, bins.slot), (bins.cached, bins.cached_slot)]
        arranged = move(queries, *tables[0], slots), gather(keys, 0, tables, slots), gather(values, 1, tables, slots)
        begin = bins.first
        if first is not None:  # the slot of a token, less the tokens of its own chunk that it sees before itself
            place = (layout.token_positions % size).expand(q.shape[:2]).flatten()
            own = torch.arange(bins.shape[1], device=q.device).repeat(bins.shape[0])
            reach = place - (first - size)
            begin = begin.flatten().clone()
            begin[bins.slot] = own[bins.slot] - reach[bins.token]
            begin = begin.view(bins.shape)
        rectangle = (x.unflatten(0, bins.shape) for x in arranged)
        found = causal_attention(*rectangle, 0, begin, dropout, dropkey)
        out = out + move(found.flatten(0, 1), bins.slot, bins.token, total)
    for group in spans.groups:
        shape = group.count, group.queries
        slots, own_slots, before_slots = group.count * group.queries, group.count * group.own, group.count * size
        arranged_q = move(queries, *group.query, slots).unflatten(0, shape)
        arranged_t = None if turned is None else move(turned, *group.query, slots).unflatten(0, shape)
        own = tuple(
            gather(x, i, [group.token, group.cached], own_slots).unflatten(0, (group.count, -1))
            for i, x in enumerate((keys, values))
        )
        tables = [group.before_token, group.before_cached, group.before_before]
        earlier = tuple(
            gather(x, i, tables, before_slots).unflatten(0, (group.count, -1)) for i, x in enumerate((keys, values))
        )
        begin = None
        if first is not None:
            begin = move(first[:, None], *group.query, slots)[:, 0].view(shape)
        visible = Visible(group.offset, begin)
        found = window_attention(arranged_q, arranged_t, *own, earlier, visible, dropout, dropkey)
        out = out + move(found.flatten(0, 1), group.query[1], group.query[0], total)
    return out.unflatten(0, q.shape[:2])
