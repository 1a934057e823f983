"""Keys and values of all that was read: the memory that grows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from megalodon import ops
from megalodon.models.kin.mixers.base import Memory
from megalodon.models.layers.open_chunk import OpenChunk
from megalodon.ops.layout import Layout

WITHOUT_END = 1 << 40
"""Tokens in a chunk that no document fills: chunk attention over such chunks is causal attention over documents."""


class Room:
    """Buffers with places to grow into, and how many of them their latest holder has filled."""

    def __init__(self, keys: Tensor, values: Tensor, filled: int) -> None:
        self.keys, self.values, self.filled = keys, values, filled


@dataclass(frozen=True)
class KeysAndValues(Memory):
    """[B, n, G, d] and [B, n, G, e]. Appending writes behind what any holder sees, so that none sees a change."""

    GROWING: ClassVar[frozenset[str]] = frozenset({"keys", "values"})
    ASIDE: ClassVar[frozenset[str]] = frozenset({"room"})

    keys: Tensor
    values: Tensor
    room: Room | None = field(default=None, compare=False, repr=False)

    @staticmethod
    def empty(batch: int, heads: int, key: int, value: int, device: torch.device, dtype: torch.dtype) -> KeysAndValues:
        """Of no tokens."""
        shape = (batch, 0, heads)
        return KeysAndValues(
            torch.zeros(*shape, key, device=device, dtype=dtype), torch.zeros(*shape, value, device=device, dtype=dtype)
        )

    def after(self, k: Tensor, v: Tensor, layout: Layout) -> KeysAndValues:
        """With the tokens k [B, L, G, d] and v [B, L, G, e] of the rows' last documents."""
        chunked = layout.with_chunks(WITHOUT_END)
        offset = chunked.uniform_offset
        if offset is None:
            left = OpenChunk.after(OpenChunk(self.keys, self.values), k, v, chunked)
            return KeysAndValues(left.keys, left.values)
        if torch.is_grad_enabled() and (k.requires_grad or self.keys.requires_grad):
            keys, values = (torch.cat([old[:, :offset], new], 1) for old, new in zip(self, (k, v), strict=True))
            return KeysAndValues(keys, values)
        room, end = self._room(k, v, offset), offset + layout.length
        room.keys[:, offset:end], room.values[:, offset:end], room.filled = k, v, end
        return KeysAndValues(room.keys[:, :end], room.values[:, :end], room)

    def with_place(self, offset: int, dtype: torch.dtype) -> KeysAndValues:
        """What `after` returns for one token of rows that all hold `offset`, before the token is written."""
        room = self._room(self.keys[:, :1].to(dtype), self.values[:, :1].to(dtype), offset)
        room.filled = offset + 1
        return KeysAndValues(room.keys[:, : offset + 1], room.values[:, : offset + 1], room)

    def _room(self, k: Tensor, v: Tensor, offset: int) -> Room:
        room, end = self.room, offset + k.shape[1]
        if room is not None and room.filled == offset and room.keys.shape[1] >= end:
            same = (room.keys.dtype, room.values.dtype) == (k.dtype, v.dtype)
            if same and (not room.keys.is_inference() or torch.is_inference_mode_enabled()):
                return room
        capacity = end if offset == 0 else end + end // 8 + 1  # an eighth more: `nbytes` does not count it
        grown = [new.new_zeros(len(new), capacity, *new.shape[2:]) for new in (k, v)]
        for buffer, old in zip(grown, self, strict=True):
            buffer[:, :offset] = old[:, :offset]
        return Room(grown[0], grown[1], offset)

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.keys, self.values))


def attend(q: Tensor, k: Tensor, v: Tensor, memory: KeysAndValues, layout: Layout) -> tuple[Tensor, KeysAndValues]:
    """Causal attention over documents, with all that was read of them.

    Args:
        q: [B, L, H, d], scaled and rotated. k: [B, L, G, d], rotated; v: [B, L, G, e]; query head h uses head
            h // (H / G).
        memory: what was read before.

    Returns:
        (out [B, L, H, e], the memory after these tokens).
    """
    chunked = layout.with_chunks(WITHOUT_END)
    after = memory.after(k, v, layout)
    groups = q.shape[2] // k.shape[2]
    offset = chunked.uniform_offset
    if offset is not None and layout.length == 1:  # the heads of a group are so many queries of one place
        folded = q.unflatten(2, (-1, groups))[:, 0].transpose(1, 2)
        out = ops.causal_attention(folded, after.keys, after.values, offset)
        return out.transpose(1, 2).flatten(1, 2)[:, None], after
    if offset == 0:
        heads, keys, values = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(heads, keys, values, is_causal=True, scale=1.0, enable_gqa=groups > 1)
        return out.transpose(1, 2), after
    if offset is not None:
        keys, values = (x.repeat_interleave(groups, 2) if groups > 1 else x for x in after)
        return ops.causal_attention(q, keys, values, offset), after
    keys, values, prefix_k, prefix_v = (
        x.repeat_interleave(groups, 2) if groups > 1 else x for x in (k, v, memory.keys, memory.values)
    )
    out = ops.chunk_attention(q, keys, values, WITHOUT_END, prefix_k=prefix_k, prefix_v=prefix_v, layout=chunked)
    return out, after
