"""Attention over landmarks and a window: every query sees the latest tokens, and of the older ones those whose position
in their document makes them landmarks. What is remembered grows by the landmarks only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from megalodon import ops
from megalodon.models.kin.mixers.base import Memory
from megalodon.ops.layout import Layout
from megalodon.ops.recent import recent_after, with_recent

QUERY_BLOCK = 64
"""Queries that share a list of keys."""

Marks = Callable[[np.ndarray], np.ndarray]
"""Positions in a document -> which of them are landmarks."""


@dataclass(frozen=True)
class LandmarkMemory(Memory):
    """keys, values: [B, n, G, .], of the landmarks, in order; recent_keys, recent_values: [B, W, G, .], of the last W
    tokens."""

    GROWING: ClassVar[frozenset[str]] = frozenset({"keys", "values"})

    keys: Tensor
    values: Tensor
    recent_keys: Tensor
    recent_values: Tensor

    @staticmethod
    def empty(
        batch: int, heads: int, key: int, value: int, window: int, device: torch.device, dtype: torch.dtype
    ) -> LandmarkMemory:
        """Of no tokens."""
        shapes = [(batch, count, heads, width) for count in (0, window) for width in (key, value)]
        return LandmarkMemory(*(torch.zeros(shape, device=device, dtype=dtype) for shape in shapes))


def attend(
    q: Tensor, k: Tensor, v: Tensor, memory: LandmarkMemory, layout: Layout, marks: Marks
) -> tuple[Tensor, LandmarkMemory]:
    """Attention of tokens over themselves, the W tokens before and all older landmarks of their document.

    Args:
        q: [B, L, H, d], scaled and rotated. k: [B, L, G, d], rotated; v: [B, L, G, e].
        memory: what was read before; W is the width of its recent tokens.

    Returns:
        (out [B, L, H, e], the memory after these tokens).
    """
    window = memory.recent_keys.shape[1]
    recent = [with_recent(old, new, window) for old, new in ((memory.recent_keys, k), (memory.recent_values, v))]
    keys, values = (
        torch.cat([old.to(new.dtype), new], dim=1)
        for old, new in zip((memory.keys, memory.values), recent, strict=True)
    )
    plan = _Plan(layout, marks, window, memory.keys.shape[1])
    out = q.new_zeros(*q.shape[:3], v.shape[-1])
    if q.numel():
        lists, visible = (torch.from_numpy(table).to(q.device) for table in (plan.lists(), plan.visible()))
        out = ops.sparse_attention(q, keys, values, visible[:, None], lists[:, None], plan.block)
    old = (memory.keys, memory.values)
    kept = [_landmarks_after(joined, plan, before) for joined, before in zip((keys, values), old, strict=True)]
    return out, LandmarkMemory(*kept, *(recent_after(joined, window, layout) for joined in recent))


def _landmarks_after(joined: Tensor, plan: _Plan, old: Tensor) -> Tensor:
    index = plan.after()
    if plan.unchanged(index):
        return old.to(joined.dtype)
    chosen = torch.from_numpy(index).to(joined.device)
    rows = torch.arange(len(joined), device=joined.device)[:, None]
    return joined[rows, chosen.clamp(min=0)].masked_fill((chosen < 0)[:, :, None, None], 0)


class _Plan:
    """Which keys each query sees, by number: the memory's n landmarks, its W recent tokens, then the L new ones."""

    def __init__(self, layout: Layout, marks: Marks, window: int, known: int) -> None:
        self.layout, self.window, self.known = layout, window, known
        self.block = min(QUERY_BLOCK, max(layout.length, 1))
        self.blocks = -(-layout.length // self.block)
        rows = slice(1) if layout.plain and len(set(layout.positions.tolist())) == 1 else slice(None)
        self.position, self.start = layout.document_positions[rows], layout.document_start[rows]
        self.read, self.lengths = layout.positions[rows], layout.lengths[rows]
        """One row stands for all where all are alike."""
        self.marked = marks(self.position) & (np.arange(layout.length) < self.lengths[:, None])
        seen = int(layout.positions.max(initial=0))
        self.known_position = np.nonzero(marks(np.arange(seen)))[0][:known]
        self.new = np.nonzero(self.marked.any(axis=0))[0]
        """Tokens of the batch that are landmarks in some row."""

    def lists(self) -> np.ndarray:
        """int64 [B, blocks, K]: known landmarks, new landmarks, then the window of the block and the block itself."""
        first = np.arange(self.blocks)[:, None] * self.block
        known = np.broadcast_to(np.arange(self.known), (self.blocks, self.known))
        offset = self.known + self.window
        new = np.where(self.new < first + self.block, offset + self.new, -1)
        near = self.known + first + np.arange(self.window + self.block)
        near = np.where(near < offset + self.layout.length, near, -1)
        table = np.concatenate([known, new, near], axis=1).astype(np.int64)
        return np.repeat(table[None], self.layout.batch, axis=0)

    def visible(self) -> np.ndarray:
        """bool [B or 1, L, K]: which of its block's list a query sees; nothing twice."""
        length, token = self.layout.length, np.arange(self.layout.length)[:, None]
        first_document = (self.start == 0)[..., None]
        known = np.zeros((*self.position.shape, self.known), dtype=bool)
        count = len(self.known_position)
        read = self.known_position < self.read[:, None, None]
        old = self.known_position < self.position[..., None] - self.window
        known[..., :count] = first_document & read & old
        new = self.marked[:, None, self.new] & (self.new < token - self.window) & (self.new >= self.start[..., None])
        nearest = token // self.block * self.block - self.window + np.arange(self.window + self.block)
        before = np.where(self.start == 0, -np.minimum(self.read, self.window)[:, None], self.start)
        near = (nearest <= token) & (nearest >= token - self.window) & (nearest < length)
        near = near & (nearest >= before[..., None])
        return np.concatenate([known, new, near], axis=2)

    def after(self) -> np.ndarray:
        """int64 [B or 1, m]: the landmarks of each row's last document, -1 where a row has fewer."""
        rows = []
        for row in range(len(self.position)):
            end = int(self.lengths[row])
            start = int(self.start[row, end - 1]) if end else 0
            read = int((self.known_position < self.read[row]).sum()) if start == 0 else 0
            new = start + np.nonzero(self.marked[row, start:end])[0]
            rows.append(np.concatenate([np.arange(read), self.known + self.window + new]))
        width = max((len(row) for row in rows), default=0)
        table = np.full((len(rows), width), -1, dtype=np.int64)
        for i, numbers in enumerate(rows):
            table[i, : len(numbers)] = numbers
        return table

    def unchanged(self, index: np.ndarray) -> bool:
        """Whether what is remembered is what was remembered."""
        return index.shape[1] == self.known and bool((index == np.arange(self.known)).all())
