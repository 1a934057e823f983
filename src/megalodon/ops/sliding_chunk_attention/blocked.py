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
from megalodon.ops.layout import Layout
from megalodon.ops.prefix import Prefix
from megalodon.ops.segments import Segments
from megalodon.ops.sliding_chunk_attention import line
from megalodon.ops.sliding_chunk_attention.window import Visible, two_chunk_attention
from megalodon.ops.tiles import move_rows, ranges, tokens_of


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
        return two_chunk_attention(q[:, start:stop], turned, *own, before, Visible(place, seen), dropout, dropkey)

    outputs = []
    if head:
        assert prefix.open is not None
        own = (
            torch.cat([prefix.open[0][:, :offset].to(k.dtype), k[:, :head]], dim=1),
            torch.cat([prefix.open[1][:, :offset].to(v.dtype), v[:, :head]], dim=1),
        )
        outputs.append(part(0, head, own, offset))
        before = own
    if whole and dropout == 0 and first is None and line.fits(v, chunk):
        queries, turned, keys, values = (
            None if x is None else tokens_of(x, head, head + whole) for x in (q, q_before, k, v)
        )
        assert queries is not None and keys is not None and values is not None
        last = keys[:, -chunk:], values[:, -chunk:]
        if before is not None:
            keys, values = (torch.cat(both, dim=1) for both in zip(before, (keys, values), strict=True))
        outputs.append(line.line_attention(queries, turned, keys, values, chunk))
        before = last
    elif whole:
        span = slice(head, head + whole)
        # chunks come one after another, so that the keys before one are those of another
        queries, turned, keys, values, seen = (
            None if x is None else x[:, span].unflatten(1, (-1, chunk)).transpose(0, 1).flatten(0, 1)
            for x in (q, q_before, k, v, first)
        )
        assert queries is not None and keys is not None and values is not None
        if whole == chunk and before is None and seen is not None:
            seen = seen - chunk
        out = two_chunk_attention(
            queries, turned, keys, values, before, Visible(0, seen), dropout, dropkey, chain=q.shape[0]
        )
        outputs.append(out.unflatten(0, (-1, q.shape[0])).transpose(0, 1).flatten(1, 2))
        before = k[:, span][:, -chunk:], v[:, span][:, -chunk:]
    if head + whole < length:
        rest = slice(head + whole, length)
        outputs.append(part(rest.start, length, (k[:, rest], v[:, rest]), 0))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


class Sides(NamedTuple):
    """`spans` spans side by side, all of which see a chunk before: tables of where their tokens and cached keys go.

    Pairs are (from, to), int64: tokens of B*L, cached keys of the open chunks of B*w and of the chunks before of B*C.

    Attributes:
        queries, own, before: the most of each in a span.
        query: tokens to slots of spans*queries. token, cached: to slots of spans*own, the span's own chunk.
        before_token, before_cached, before_before: to slots of spans*before.
        offset: int64 [spans]; the place of a span's first token in its chunk.
    """

    spans: int
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
        spans = layout.chunk_spans
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
    row, first, cached, tokens = layout.chunk_spans[chosen].T
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
    earlier = layout.chunk_spans[np.maximum(chosen - 1, 0)]
    inside = np.where(leading, 0, earlier[:, 3])
    held = np.where(leading, 0, earlier[:, 2])
    return Sides(
        spans=len(chosen),
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


class _Arranged(NamedTuple):
    """Queries, keys and values of a ragged batch as rows, tokens and cached keys alike, to be moved where they belong.

    Attributes:
        q, q_before, k, v: [B L, H, .].
        first: int64 [B L]; see `first_visible`.
        open, before: cached keys and values, [B w, H, .] and [B C, H, .] each.
    """

    q: Tensor
    q_before: Tensor | None
    k: Tensor
    v: Tensor
    first: Tensor | None
    open: tuple[Tensor, Tensor] | None
    before: tuple[Tensor, Tensor] | None

    def keys_and_values(self, tables: list[tuple[Tensor, Tensor]], slots: int, rows: int) -> tuple[Tensor, Tensor]:
        """[rows, slots / rows, H, .] each: tokens by the first table, cached ones by those that follow."""

        def gather(new: Tensor, which: int) -> Tensor:
            out = move_rows(new, *tables[0], slots)
            for cached, table in zip((self.open, self.before), tables[1:], strict=False):
                if table[0].numel():
                    assert cached is not None
                    out = out + move_rows(cached[which].to(new.dtype), *table, slots)
            return out.unflatten(0, (rows, -1))

        return gather(self.k, 0), gather(self.v, 1)

    def in_bins(self, layout: Layout, spans: np.ndarray, dropout: float, dropkey: bool) -> Tensor:
        """What the queries of spans without a chunk before find: [B L, H, e], zero elsewhere."""
        bins = layout.pack(spans)
        slots = bins.shape[0] * bins.shape[1]
        keys, values = self.keys_and_values(
            [(bins.token, bins.slot), (bins.cached, bins.cached_slot)], slots, bins.shape[0]
        )
        first = bins.first
        if self.first is not None:  # a token's slot, less the tokens of its chunk that it sees before itself
            assert layout.chunk_size is not None
            places = (layout.token_positions % layout.chunk_size).expand(layout.batch, -1).flatten()
            own = torch.arange(bins.shape[1], device=first.device).repeat(bins.shape[0])
            first = first.flatten().clone()
            first[bins.slot] = own[bins.slot] - (places + layout.chunk_size - self.first)[bins.token]
            first = first.view(bins.shape)
        queries = move_rows(self.q, bins.token, bins.slot, slots).unflatten(0, bins.shape)
        found = causal_attention(queries, keys, values, 0, first, dropout, dropkey)
        return move_rows(found.flatten(0, 1), bins.slot, bins.token, len(self.q))

    def side_by_side(self, group: Sides, size: int, dropout: float, dropkey: bool) -> Tensor:
        """What the queries of a group of spans find: [B L, H, e], zero elsewhere."""
        shape, slots = (group.spans, group.queries), group.spans * group.queries
        own = self.keys_and_values([group.token, group.cached], group.spans * group.own, group.spans)
        tables = [group.before_token, group.before_cached, group.before_before]
        before = self.keys_and_values(tables, group.spans * size, group.spans)
        q, q_before, first = (
            None if x is None else move_rows(x, *group.query, slots).unflatten(0, shape)
            for x in (self.q, self.q_before, self.first)
        )
        assert q is not None
        found = two_chunk_attention(q, q_before, *own, before, Visible(group.offset, first), dropout, dropkey)
        return move_rows(found.flatten(0, 1), group.query[1], group.query[0], len(self.q))


def flattened(cached: tuple[Tensor, Tensor] | None, width: int) -> tuple[Tensor, Tensor] | None:
    """The first `width` places of cached keys and values, as rows of B*width."""
    return None if cached is None else (cached[0][:, :width].flatten(0, 1), cached[1][:, :width].flatten(0, 1))


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
    size, width = layout.chunk_size, layout.longest_offset
    assert size is not None
    first = first_visible(layout, segments)
    arranged = _Arranged(
        q.flatten(0, 1),
        None if q_before is None else q_before.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        None if first is None else first.expand(q.shape[:2]).flatten(),
        None
        if prefix.open is None
        else (prefix.open[0][:, :width].flatten(0, 1), prefix.open[1][:, :width].flatten(0, 1)),
        None if prefix.before is None else (prefix.before[0].flatten(0, 1), prefix.before[1].flatten(0, 1)),
    )
    spans = spans_of(layout)
    parts = [arranged.side_by_side(group, size, dropout, dropkey) for group in spans.groups]
    if len(spans.lone):
        parts.append(arranged.in_bins(layout, spans.lone, dropout, dropkey))
    out = sum(parts[1:], parts[0]) if parts else torch.zeros_like(v).flatten(0, 1)
    return out.unflatten(0, q.shape[:2])
