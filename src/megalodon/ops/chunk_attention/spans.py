"""Spans for the attention kernels: which rows of q, k and the cache make up each chunk of each document."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megalodon.ops.layout import Layout


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


@lru_cache(maxsize=64)
def chunks(
    batch: int, length: int, chunk: int, offset: int, cache_width: int, block: int, device: torch.device
) -> Spans:
    """Rows of `length` tokens that all have `offset` tokens in their open chunk."""
    begins = np.unique(np.concatenate([[0], np.arange(chunk - offset, length, chunk)]))
    ends = np.append(begins[1:], length)
    row = np.repeat(np.arange(batch), len(begins))
    first, last = np.tile(begins, batch), np.tile(ends, batch)
    cached = np.where(first == 0, offset, 0)
    return _tables(row * length + first, last - first, row * length + first, row * cache_width, cached, block, device)


@lru_cache(maxsize=64)
def window(batch: int, length: int, width: int, offset: int, block: int, device: torch.device) -> Spans:
    """Rows of `length` queries whose first stands at place `offset` of their row of `width` keys."""
    row = np.arange(batch)
    spans = np.stack([row * length, row * 0 + length, row * width, row * 0 + offset + length, row * 0, row * 0], axis=1)
    return _with_work(spans, block, device)


def ragged(layout: Layout, cache_width: int, block: int) -> Spans:
    """Any layout; made once for all layers."""
    cache = layout.__dict__.setdefault("_attention_spans", {})
    if (cache_width, block) not in cache:
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
        at = row * layout.length + first
        cache[cache_width, block] = _tables(at, ends - first, at, row * cache_width, cached, block, layout.device)
    return cache[cache_width, block]


def _tables(
    query: np.ndarray,
    queries: np.ndarray,
    key: np.ndarray,
    cache: np.ndarray,
    cached: np.ndarray,
    block: int,
    device: torch.device,
) -> Spans:
    return _with_work(np.stack([query, queries, key, queries + cached, cache, cached], axis=1), block, device)


def _with_work(spans: np.ndarray, block: int, device: torch.device) -> Spans:
    queries, keys = spans[:, 1], spans[:, 3]
    of_queries, of_keys = _blocks(queries, block), _blocks(keys, block)
    seen = of_queries[:, 1] + (keys - queries)[of_queries[:, 0]]
    seeing = keys[of_keys[:, 0]] - of_keys[:, 1]
    ordered = of_queries[np.argsort(-seen, kind="stable")], of_keys[np.argsort(-seeing, kind="stable")]
    tables = (np.ascontiguousarray(table.astype(np.int32)) for table in (spans, *ordered))
    return Spans(*(torch.from_numpy(table).to(device) for table in tables))


def _blocks(lengths: np.ndarray, block: int) -> np.ndarray:
    """[w, 2]: (which, first) of every block of every length."""
    counts = -(-lengths // block)
    which = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.stack([which, number * block], axis=1)
