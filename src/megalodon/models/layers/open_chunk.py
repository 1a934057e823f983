"""The keys and values of the chunk that is still open: what attention inside chunks remembers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megalodon.ops.layout import Layout
from megalodon.ops.tiles import move_rows


class OpenChunk:
    """Rotated keys and values of the chunk that each row is in, at the start of two buffers with some room behind.

    Appending in place is safe for one holder of a buffer only: whoever appends takes the right to it, and the chunk
    that comes of it has the next. A holder without it copies instead, so every holder keeps seeing what it held. To
    take it is one operation, in which no other thread can come between.

    Args:
        keys, values: [B, places, H, d] and [B, places, H, e].
        filled: places in use by the fullest row. None: all.
        may_append: whether this holder has the right to.
    """

    def __init__(self, keys: Tensor, values: Tensor, filled: int | None = None, may_append: bool = True) -> None:
        self.keys, self.values = keys, values
        self.filled = keys.shape[1] if filled is None else filled
        self._right = [None] * may_append

    @staticmethod
    def append(chunk: OpenChunk | None, k: Tensor, v: Tensor, layout: Layout) -> OpenChunk:
        """The chunk with the tokens k [B, L, H, d] and v [B, L, H, e], which must fit (`layout.fits_open_chunk`)."""
        needed = layout.most_keys
        if chunk is None:
            chunk = OpenChunk(k[:, :0], v[:, :0])
        differentiable = torch.is_grad_enabled() and (k.requires_grad or chunk.keys.requires_grad)
        capacity = needed if differentiable else _capacity(needed, layout.chunk_size)
        # where a chunk begins, its places hold what earlier holders still see
        if layout.begins_chunk or differentiable or not chunk._taken(needed, k, v):
            chunk = chunk._grown(layout.longest_offset, capacity, k, v)
        offset = layout.uniform_offset
        if offset is not None:
            chunk.keys[:, offset : offset + layout.length] = k
            chunk.values[:, offset : offset + layout.length] = v
        else:
            rows, tokens = np.nonzero(np.arange(layout.length) < layout.lengths[:, None])
            places = torch.from_numpy(layout.offsets[rows] + tokens).to(k.device)
            row, token = torch.from_numpy(rows).to(k.device), torch.from_numpy(tokens).to(k.device)
            chunk.keys[row, places] = k[row, token].to(chunk.keys.dtype)
            chunk.values[row, places] = v[row, token].to(chunk.values.dtype)
        return OpenChunk(chunk.keys, chunk.values, max(needed, layout.longest_offset))

    def with_token(self, k: Tensor, v: Tensor, offset: int, chunk_size: int) -> OpenChunk:
        """`append` without gradients of one token, k [B, H, d] and v [B, H, e], to rows that all hold `offset`."""
        chunk = self.with_room(k, v, offset, chunk_size)
        chunk.keys[:, offset], chunk.values[:, offset] = k, v
        return chunk

    def with_room(self, k: Tensor, v: Tensor, offset: int, chunk_size: int) -> OpenChunk:
        """What `with_token` returns, before the token is written; k and v only say how many rows and which dtypes."""
        chunk, needed = self, offset + 1
        if offset == 0 or not self._taken(needed, k, v):
            chunk = self.copied(offset, chunk_size, k, v)
        return OpenChunk(chunk.keys, chunk.values, needed)

    def copied(self, used: int, chunk_size: int, k: Tensor, v: Tensor) -> OpenChunk:
        """The first `used` places in buffers of their own, in the dtypes of k and v, with room for another token."""
        return self._grown(used, _capacity(used + 1, chunk_size), k, v)

    @staticmethod
    def after(chunk: OpenChunk | None, k: Tensor, v: Tensor, layout: Layout) -> OpenChunk:
        """What is left open once the tokens k, v are read, where chunks were completed or documents begun."""
        if chunk is None:
            chunk = OpenChunk(k[:, :0], v[:, :0])
        assert layout.chunk_size is not None
        if layout.uniform_offset is not None:
            width = (layout.uniform_offset + layout.length) % layout.chunk_size
            if width <= layout.length:
                last = OpenChunk(k[:, layout.length - width :], v[:, layout.length - width :])
                exact = not width or (torch.is_grad_enabled() and k.requires_grad)
                return last._grown(width, width if exact else _capacity(width, layout.chunk_size), k, v)
        batch, cached_width = layout.batch, layout.longest_offset
        cached, cached_target, token, token_target, left = layout.open_chunk()
        width = int(left.max(initial=0))

        def keep(old: Tensor, new: Tensor) -> Tensor:
            kept = move_rows(new.flatten(0, 1), token, token_target, batch * max(width, 1))
            if cached.numel():
                old = old[:, :cached_width].flatten(0, 1).to(new.dtype)
                kept = kept + move_rows(old, cached, cached_target, batch * max(width, 1))
            return kept.unflatten(0, (batch, -1))[:, :width]

        return OpenChunk(keep(chunk.keys, k), keep(chunk.values, v))

    def contents(self, layout: Layout) -> tuple[Tensor, Tensor, int | Tensor]:
        """(keys, values, where the newest tokens begin: one number, or int64 [B] where rows differ), for attention."""
        filled = layout.most_keys
        offset: int | Tensor | None = layout.uniform_offset
        if offset is None:
            offset = torch.from_numpy(layout.offsets).to(self.keys.device)
            filled = max(filled, layout.longest_offset + layout.length)
            missing = filled - self.keys.shape[1]
            if missing > 0:  # padding tokens may stand beyond every key: give them something to see
                keys, values = (torch.cat([x, x.new_zeros(len(x), missing, *x.shape[2:])], 1) for x in self)
                return keys, values, offset
        return self.keys[:, :filled], self.values[:, :filled], offset

    def left_open(self, layout: Layout) -> OpenChunk:
        """What `append` gave, without the keys and values of chunks that it completed."""
        assert layout.chunk_size is not None
        if layout.uniform_offset is not None:
            width = (layout.uniform_offset + layout.length) % layout.chunk_size
        else:
            width = int((layout.end_positions % layout.chunk_size).max(initial=0))
        return self.first(width)

    def first(self, width: int) -> OpenChunk:
        """The first places, in buffers of their own if there are others in use."""
        if width >= self.filled:
            return self
        keys, values = (buffer[:, :width].clone() for buffer in self)
        return OpenChunk(keys, values)

    def fitted(self, position: Tensor, sizes: Any) -> OpenChunk:
        """The chunk without places that no row uses."""
        return self.first(int((position % sizes.chunk_size).max()) if len(position) else 0)

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.keys, self.values))

    def map(self, function: Callable[[Tensor], Tensor]) -> OpenChunk:
        """A chunk of its own, with copies of what `function` makes of the keys and values in use."""
        keys, values = (function(buffer[:, : self.filled]).clone() for buffer in self)
        return OpenChunk(keys, values)

    def detach(self) -> OpenChunk:
        """The same chunk without its history; the buffers stay shared, and the right to append."""
        chunk = OpenChunk(self.keys.detach(), self.values.detach(), self.filled)
        chunk._right = self._right
        return chunk

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and files hold what is in use."""
        return OpenChunk, tuple(buffer[:, : self.filled].clone() for buffer in self)

    def cast(self, dtype: torch.dtype) -> OpenChunk:
        """The chunk with keys and values in `dtype`."""
        return self.map(lambda x: x.to(dtype))

    def reset(self, rows: Tensor) -> OpenChunk:
        """The chunk where rows begin afresh: as it is, because their position says that they hold nothing."""
        return self

    @staticmethod
    def concatenate(chunks: Sequence[OpenChunk]) -> OpenChunk:
        """One batch of the rows of several, in order."""
        width = max(chunk.filled for chunk in chunks)
        wide = [chunk._grown(chunk.filled, width, chunk.keys, chunk.values) for chunk in chunks]
        return OpenChunk(torch.cat([chunk.keys for chunk in wide]), torch.cat([chunk.values for chunk in wide]))

    def tensors(self, position: Tensor, sizes: Any) -> dict[str, Tensor]:
        """What is kept on disk, by name: the filled part of the fullest row.

        Args:
            position: int64 [B]; tokens that each row has read. sizes: has `chunk_size`.
        """
        filled = int((position % sizes.chunk_size).max()) if len(position) else 0
        return {"keys": self.keys[:, :filled], "values": self.values[:, :filled]}

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> OpenChunk:
        """The inverse of `tensors`."""
        return OpenChunk(tensors["keys"].clone(), tensors["values"].clone())

    def _taken(self, needed: int, k: Tensor, v: Tensor) -> bool:
        """Whether `needed` places of the buffers may be written; then the right to it is taken."""
        fit = (
            self.keys.shape[1] >= needed
            and (self.keys.dtype, self.values.dtype) == (k.dtype, v.dtype)
            and not self.keys.requires_grad
            and not (self.keys.is_inference() and not torch.is_inference_mode_enabled())
        )
        if not fit:
            return False
        try:
            self._right.pop()  # one operation: two threads cannot both succeed
        except IndexError:
            return False
        return True

    def _grown(self, used: int, capacity: int, k: Tensor, v: Tensor) -> OpenChunk:
        """A copy in new buffers; empty places are zero, so that hidden keys have finite scores."""

        def grow(old: Tensor, new: Tensor) -> Tensor:
            empty = new.new_zeros(len(new), capacity - used, *old.shape[2:])
            return torch.cat([old[:, :used].to(new.dtype), empty], dim=1)

        return OpenChunk(grow(self.keys, k), grow(self.values, v), used)


def _capacity(needed: int, chunk_size: int | None) -> int:
    """Places of a new buffer: an eighth more to grow in, at most a chunk. `nbytes` does not count them: so few."""
    return min(chunk_size or needed, needed + needed // 8 + 1)
