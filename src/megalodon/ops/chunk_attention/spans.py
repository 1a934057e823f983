"""Spans for attention on a GPU: which rows of q, k and the cache make up each chunk of each document."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megalodon.ops.layout import Layout, PlainLayout


class Spans(NamedTuple):
    """Tables, int32.

    Attributes:
        spans: [n, 6]; first row of q and how many; first row of k and how many keys, those of the cache included; first
            row of the cache and how many.
        query_work, key_work: [w, 2]; (span, first query or key of a block) of each program, the longest first.
    """

    spans: Tensor
    query_work: Tensor
    key_work: Tensor


class Group(NamedTuple):
    """`spans` spans of one shape, `query_step` rows of q and `key_step` rows of k apart; none has cached keys."""

    first_query: int
    queries: int
    query_step: int
    first_key: int
    keys: int
    key_step: int
    spans: int


@lru_cache(maxsize=64)
def chunks(
    batch: int, length: int, chunk: int, offset: int, cache_width: int, block: int, device: torch.device
) -> Spans:
    """Rows of `length` tokens that all have `offset` tokens in their open chunk."""
    return _with_work(_spans_of_chunks(batch, length, chunk, offset, cache_width), block, device)


@lru_cache(maxsize=64)
def window(batch: int, length: int, width: int, offset: int, block: int, device: torch.device) -> Spans:
    """Rows of `length` queries whose first stands at place `offset` of their row of `width` keys."""
    return _with_work(_spans_of_window(batch, length, width, offset), block, device)


def ragged(layout: Layout, cache_width: int, block: int) -> Spans:
    """Any layout; made once for all layers."""
    cache = layout.__dict__.setdefault("_attention_spans", {})
    if (cache_width, block) not in cache:
        cache[cache_width, block] = _with_work(_spans_of_layout(layout, cache_width), block, layout.device)
    return cache[cache_width, block]


@lru_cache(maxsize=64)
def groups_of_chunks(batch: int, length: int, chunk: int) -> tuple[Group, ...]:
    """Rows of `length` tokens at the start of a chunk."""
    return _groups(_spans_of_chunks(batch, length, chunk, 0, 0))


@lru_cache(maxsize=64)
def groups_of_window(batch: int, length: int, width: int, offset: int) -> tuple[Group, ...]:
    """The rows of `window`."""
    return _groups(_spans_of_window(batch, length, width, offset))


@lru_cache(maxsize=64)
def plain_windows(
    batch: int, length: int, chunk: int, position: int, open_width: int, block: int, device: torch.device
) -> tuple[Spans, Spans]:
    """`two_chunk_windows` of rows of `length` tokens that have all seen `position`."""
    layout = PlainLayout(batch, length, device, position, chunk)
    return two_chunk_windows(layout, open_width, block, position >= chunk)


def two_chunk_windows(layout: Layout, open_width: int, block: int, before: bool) -> tuple[Spans, Spans]:
    """(each chunk's own keys, those of the chunk before it where there is one); made once for all layers.

    A row of the cache holds `open_width` tokens of the open chunk and then, if `before`, those of the chunk before it.
    """
    cache = layout.__dict__.setdefault("_two_chunk_windows", {})
    if (open_width, block, before) not in cache:
        chunk, width = layout.chunk_size, open_width
        assert chunk is not None
        width += chunk if before else 0
        row, first, cached, tokens = layout.chunk_spans.T
        at = row * layout.length + first
        own = _spans(at, tokens, row * width, cached)
        chosen = np.flatnonzero(layout.document_positions[row, first] >= chunk)
        leading = first[chosen] == 0  # the chunk before is cached whole; else it is the span before, cached or not
        earlier = np.maximum(chosen - 1, 0)
        held = np.where(leading, chunk, cached[earlier])
        fresh = np.where(leading, 0, tokens[earlier])
        from_cache = row[chosen] * width + np.where(leading, open_width, 0)
        parts = (at[chosen], tokens[chosen], at[chosen] - fresh, held + fresh, from_cache, held)
        cache[open_width, block, before] = tuple(
            _with_work(spans, block, layout.device, whole)
            for spans, whole in ((own, False), (np.stack(parts, axis=1), True))
        )
    return cache[open_width, block, before]


def groups_of_layout(layout: Layout) -> tuple[Group, ...]:
    """Any layout without cached keys; made once for all layers."""
    if "_attention_groups" not in layout.__dict__:
        layout.__dict__["_attention_groups"] = _groups(_spans_of_layout(layout, 0))
    return layout.__dict__["_attention_groups"]


def _spans_of_chunks(batch: int, length: int, chunk: int, offset: int, cache_width: int) -> np.ndarray:
    begins = np.unique(np.concatenate([[0], np.arange(chunk - offset, length, chunk)]))
    ends = np.append(begins[1:], length)
    row = np.repeat(np.arange(batch), len(begins))
    first, last = np.tile(begins, batch), np.tile(ends, batch)
    return _spans(row * length + first, last - first, row * cache_width, np.where(first == 0, offset, 0))


def _spans_of_window(batch: int, length: int, width: int, offset: int) -> np.ndarray:
    row, zero = np.arange(batch), np.zeros(batch, dtype=np.int64)
    return np.stack([row * length, zero + length, row * width, zero + offset + length, zero, zero], axis=1)


def _spans_of_layout(layout: Layout, cache_width: int) -> np.ndarray:
    assert layout.chunk_size is not None
    index = np.arange(layout.length)
    begins = (layout.document_positions % layout.chunk_size == 0) | (index == 0)
    if layout.starts is not None:
        begins |= layout.starts
    begins &= index < layout.lengths[:, None]
    row, first = np.nonzero(begins)
    last_of_row = np.append(row[1:] != row[:-1], True)[: len(row)]
    ends = np.where(last_of_row, layout.lengths[row], np.append(first[1:], 0)[: len(row)])
    cached = np.where(first == 0, layout.offsets[row], 0)
    return _spans(row * layout.length + first, ends - first, row * cache_width, cached)


def _spans(at: np.ndarray, queries: np.ndarray, cache: np.ndarray, cached: np.ndarray) -> np.ndarray:
    """Spans whose queries and fresh keys are the same tokens, from `at` on."""
    return np.stack([at, queries, at, queries + cached, cache, cached], axis=1)


def _groups(spans: np.ndarray) -> tuple[Group, ...]:
    """Spans of one shape at equal distances become one group."""
    assert not spans[:, 5].any()
    found: list[Group] = []
    for query, queries, key, keys in spans[np.argsort(-spans[:, 1], kind="stable")][:, :4].tolist():
        last = found[-1] if found else None
        if last is None or (last.queries, last.keys) != (queries, keys):
            found.append(Group(query, queries, 0, key, keys, 0, 1))
            continue
        steps = query - last.first_query, key - last.first_key
        if last.spans == 1:
            found[-1] = last._replace(query_step=steps[0], key_step=steps[1], spans=2)
        elif steps == (last.spans * last.query_step, last.spans * last.key_step):
            found[-1] = last._replace(spans=last.spans + 1)
        else:
            found.append(Group(query, queries, 0, key, keys, 0, 1))
    return tuple(found)


def _with_work(spans: np.ndarray, block: int, device: torch.device, whole: bool = False) -> Spans:
    """`whole`: every query sees every key of its span."""
    queries, keys = spans[:, 1], spans[:, 3]
    of_queries, of_keys = _blocks(queries, block), _blocks(keys, block)
    seen = of_queries[:, 1] + (keys - queries)[of_queries[:, 0]]
    seeing = keys[of_keys[:, 0]] - of_keys[:, 1]
    if whole:
        seen, seeing = keys[of_queries[:, 0]], queries[of_keys[:, 0]]
    ordered = of_queries[np.argsort(-seen, kind="stable")], of_keys[np.argsort(-seeing, kind="stable")]
    tables = (np.ascontiguousarray(table.astype(np.int32)) for table in (spans, *ordered))
    return Spans(*(torch.from_numpy(table).to(device) for table in tables))


def _blocks(lengths: np.ndarray, block: int) -> np.ndarray:
    """[w, 2]: (which, first) of every block of every length."""
    counts = -(-lengths // block)
    which = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.stack([which, number * block], axis=1)
