"""What Gecko's attention remembers: the chunk before and the open one, and the matrix of all that left them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megalodon.models.layers.open_chunk import OpenChunk
from megalodon.ops.backend import full_precision
from megalodon.ops.layout import Layout
from megalodon.ops.tiles import move_rows, ranges


class Window(NamedTuple):
    """The memory of attention, rows first. Keys are [B, n, H, 2d]: rotated keys, then the working memory's.

    Attributes:
        open: keys and values of the open chunk.
        before: those of the chunk before it, C tokens or none; what a row holds here that has seen less counts nothing.
        memory, log_mass: the working memory of all chunks before that, [B, H, d, e] and [B, H, d], float32 or better.
        bos_before, bos_open: int64 [B]; where in the two chunks the last BOS token stands, -1 where there is none.
    """

    open: OpenChunk
    before: OpenChunk
    memory: Tensor
    log_mass: Tensor
    bos_before: Tensor
    bos_open: Tensor

    @staticmethod
    def empty(keys: Tensor, values: Tensor) -> Window:
        """Of sequences of which nothing is read, whose keys [B, L, H, 2d] and values [B, L, H, e] are to come."""
        batch, _, heads, width = keys.shape
        wide = full_precision(values.dtype)
        none = OpenChunk(keys[:, :0], values[:, :0])
        place = torch.full((batch,), -1, dtype=torch.int64, device=keys.device)
        return Window(
            none,
            none,
            values.new_zeros(batch, heads, width // 2, values.shape[-1], dtype=wide),
            values.new_full((batch, heads, width // 2), -torch.inf, dtype=wide),
            place,
            place,
        )

    @staticmethod
    def without_segments(open_: OpenChunk, before: OpenChunk, memory: Tensor, log_mass: Tensor) -> Window:
        """Of sequences in which no BOS token starts anything."""
        nowhere = torch.full(log_mass.shape[:1], -1, dtype=torch.int64, device=log_mass.device)
        return Window(open_, before, memory, log_mass, nowhere, nowhere)

    def prefix(self) -> dict[str, Tensor | None]:
        """The keys and values as operators take them; the keys of attention and of the memory side by side."""
        has_before = self.before.filled > 0
        return {
            "before_k": self.before.keys if has_before else None,
            "before_v": self.before.values if has_before else None,
            "open_k": self.open.keys,
            "open_v": self.open.values,
        }

    def before_after(self, k: Tensor, v: Tensor, layout: Layout) -> OpenChunk:
        """The chunk before the open one once the tokens k [B, L, H, 2d], v [B, L, H, e] are read."""
        size = layout.chunk_size
        assert size is not None
        if layout.plain and (layout.positions == layout.positions[0]).all():
            return self._before_of_equal_rows(k, v, int(layout.positions[0]), size)
        end = layout.lengths - layout.end_positions % size  # where the chunk ends, in the batch's tokens
        has = layout.end_positions >= size
        if not has.any():
            return OpenChunk(k[:, :0], v[:, :0])
        rows, width = np.arange(layout.batch), layout.longest_offset
        fresh = np.where(has, np.clip(end, 0, size), 0)
        kept = has & (end <= 0)
        opened = np.where(has & ~kept, size - fresh, 0)

        def pair(source: np.ndarray, target: np.ndarray, counts: np.ndarray) -> tuple[Tensor, Tensor]:
            lists = (ranges(source, counts), ranges(target, counts))
            first, second = (torch.from_numpy(x).to(k.device) for x in lists)
            return first, second

        tokens = pair(rows * layout.length + end - fresh, rows * size + opened, fresh)
        from_open = pair(rows * max(width, 1), rows * size, opened)
        from_before = pair(rows * size, rows * size, np.where(kept, size, 0))

        def gather(new: Tensor, opened: Tensor, before: Tensor) -> Tensor:
            out = move_rows(new.flatten(0, 1), *tokens, layout.batch * size)
            for old, pairs in ((opened[:, :width], from_open), (before[:, :size], from_before)):
                if len(pairs[0]):
                    out = out + move_rows(old.flatten(0, 1).to(new.dtype), *pairs, layout.batch * size)
            return out.unflatten(0, (layout.batch, size))

        return OpenChunk(gather(k, self.open.keys, self.before.keys), gather(v, self.open.values, self.before.values))

    def _before_of_equal_rows(self, k: Tensor, v: Tensor, position: int, size: int) -> OpenChunk:
        offset, length = position % size, k.shape[1]
        complete = (offset + length) // size * size - offset  # where the last complete chunk ends, in the tokens
        if complete <= 0:
            return self.before
        if complete >= size:
            span = slice(complete - size, complete)
            return OpenChunk(k[:, span].clone(), v[:, span].clone())
        keys = torch.cat([self.open.keys[:, :offset].to(k.dtype), k[:, :complete]], dim=1)
        values = torch.cat([self.open.values[:, :offset].to(v.dtype), v[:, :complete]], dim=1)
        return OpenChunk(keys, values)

    # --- what a state's memories promise ----------------------------------------------------------------------------

    def map(self, function: Callable[[Tensor], Tensor]) -> Window:
        """A window with copies of what `function` makes of each tensor."""
        others = (function(x).clone() for x in self[2:])
        return Window(self.open.map(function), self.before.map(function), *others)

    def detach(self) -> Window:
        """The same window without its history."""
        return Window(self.open.detach(), self.before.detach(), *(x.detach() for x in self[2:]))

    def cast(self, dtype: torch.dtype) -> Window:
        """The window with keys and values in `dtype`; the memory is a sum, and keeps its precision."""
        return self._replace(open=self.open.cast(dtype), before=self.before.cast(dtype))

    def reset(self, rows: Tensor) -> Window:
        """The window where rows begin afresh. Their position says that they hold no token."""
        return self._replace(
            memory=self.memory.masked_fill(rows[:, None, None, None], 0),
            log_mass=self.log_mass.masked_fill(rows[:, None, None], -torch.inf),
            bos_before=self.bos_before.masked_fill(rows, -1),
            bos_open=self.bos_open.masked_fill(rows, -1),
        )

    @staticmethod
    def concatenate(windows: Sequence[Window]) -> Window:
        """One batch of the rows of several, in order."""
        opened, before, *others = zip(*windows, strict=True)
        return Window(
            OpenChunk.concatenate(opened), OpenChunk.concatenate(before), *(torch.cat(column) for column in others)
        )

    def fitted(self, position: Tensor, sizes: Any) -> Window:
        """The window without room that no row uses."""
        before = self.before.first(_width_before(position, sizes.chunk_size))
        return self._replace(open=self.open.fitted(position, sizes), before=before)

    def tensors(self, position: Tensor, sizes: Any) -> dict[str, Tensor]:
        """What is kept on disk, by name: the open chunk as far as the fullest row fills it."""
        width = _width_before(position, sizes.chunk_size)
        return {
            **self.open.tensors(position, sizes),
            "before.keys": self.before.keys[:, :width],
            "before.values": self.before.values[:, :width],
            "memory": self.memory,
            "log_mass": self.log_mass,
            "bos_before": self.bos_before.clone(),  # all layers share them; in a file each has its own
            "bos_open": self.bos_open.clone(),
        }

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> Window:
        """The inverse of `tensors`."""
        return Window(
            OpenChunk.from_tensors(tensors),
            OpenChunk(tensors["before.keys"].clone(), tensors["before.values"].clone()),
            *(tensors[name] for name in ("memory", "log_mass", "bos_before", "bos_open")),
        )


def _width_before(position: Tensor, size: int) -> int:
    return size if len(position) and int(position.max()) >= size else 0
