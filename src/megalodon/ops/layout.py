"""Where the tokens of a batch stand: in their document, in their chunk, in their row.

A `Layout` is made once per forward pass and shared by every layer. Most batches are *plain*: every row is full and is
one document, and nothing here costs anything. Batches with packed documents, padding, or rows at different points of
their chunks are *ragged*. The operators compute on dense tiles, so for a ragged batch the layout says where each token
goes:

- `blocks(T)`: documents aligned to blocks of T tokens, for CEMA, whose state starts afresh at a block's start;
- `bins`: spans (one chunk of one document) packed into rectangles, for attention, masked by where a span begins.

What these tiles are, and how tokens move there and back, stands in `tiles`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from megalodon.ops.tiles import Bins, Blocks, first_fit_decreasing, ranges

if TYPE_CHECKING:
    from megalodon.ops.segments import Segments


class Layout:
    """Where each token of a batch of B rows of L tokens stands.

    Args:
        batch, length: B and L.
        device: where index tensors are made.
        segment_ids: int [B, L]; a change along L starts a new document. None: each row is one document.
        lengths: int [B]; how many tokens of each row are real, from its start. None: all.
        positions: how many tokens of its first document each row has seen before. None: 0.
        chunk_size: C; needed for everything about chunks.

    `segments` is None, or where BOS tokens cut the batch while its chunks go on: set by whoever makes both.

    The first document of a row continues what the row's state remembers; the others start afresh. `layout_of` makes the
    layout of a batch: a `PlainLayout` where nothing but numbers tells its rows from others.
    """

    segments: Segments | None = None

    def __init__(
        self,
        batch: int,
        length: int,
        device: torch.device | str = "cpu",
        *,
        segment_ids: Tensor | None = None,
        lengths: Sequence[int] | Tensor | np.ndarray | None = None,
        positions: Sequence[int] | Tensor | np.ndarray | None = None,
        chunk_size: int | None = None,
    ) -> None:
        if segment_ids is not None and segment_ids.shape != (batch, length):
            raise ValueError(f"segment_ids has shape {tuple(segment_ids.shape)}: it must be {(batch, length)}")
        self.batch, self.length, self.device, self.chunk_size = batch, length, torch.device(device), chunk_size
        self._lengths = _whole_numbers("lengths", lengths, batch, length)
        self._positions = _whole_numbers("positions", positions, batch, 0)
        self._segments = None if segment_ids is None else segment_ids.detach().cpu().numpy()

    @property
    def lengths(self) -> np.ndarray:
        """int64 [B]: how many tokens of each row are real."""
        return self._lengths

    @property
    def positions(self) -> np.ndarray:
        """int64 [B]: how many tokens of its first document each row has seen before."""
        return self._positions

    @cached_property
    def starts(self) -> np.ndarray | None:
        """bool [B, L]: the token starts a new document. None when every row is one document."""
        if self._segments is None or self.length < 2:
            return None
        starts = np.zeros((self.batch, self.length), dtype=bool)
        starts[:, 1:] = self._segments[:, 1:] != self._segments[:, :-1]
        starts &= np.arange(self.length) < self.lengths[:, None]
        return starts if starts.any() else None

    @cached_property
    def plain(self) -> bool:
        """Every row is full and is one document."""
        return self.starts is None and bool((self.lengths == self.length).all())

    @cached_property
    def seen(self) -> Tensor:
        """int64 [B]: `positions`, where the tokens are."""
        return self._tensor(self.positions)

    @cached_property
    def fresh_rows(self) -> Tensor | None:
        """bool [B]: rows that have seen nothing of their first document. None: there are none."""
        fresh = self.positions == 0
        return self._tensor(fresh) if fresh.any() else None

    def with_chunks(self, chunk_size: int) -> Layout:
        """The same layout with chunks of this size, made once."""
        cache = self.__dict__.setdefault("_with_chunks", {})
        if chunk_size not in cache:
            cache[chunk_size] = self._chunked(chunk_size)
        return cache[chunk_size]

    def _chunked(self, chunk_size: int) -> Layout:
        other = Layout(
            self.batch,
            self.length,
            self.device,
            lengths=self._lengths,
            positions=self._positions,
            chunk_size=chunk_size,
        )
        other._segments = self._segments
        return other

    @cached_property
    def document_begins(self) -> Tensor:
        """int64 [B, L]: `document_start`, where the tokens are."""
        return self._tensor(self.document_start)

    @cached_property
    def offsets(self) -> np.ndarray:
        """int64 [B]: tokens in each row's open chunk before this batch."""
        if self.chunk_size is None:
            raise ValueError("chunk_size is needed to place tokens in chunks")
        return self.positions % self.chunk_size

    @cached_property
    def longest_offset(self) -> int:
        """The largest of `offsets`."""
        return int(self.offsets.max(initial=0))

    @cached_property
    def most_seen(self) -> int:
        """The most tokens that a row's first document had before this batch."""
        return int(self.positions.max(initial=0))

    @cached_property
    def most_keys(self) -> int:
        """Tokens of the fullest row's open chunk with those of this batch, where they fit."""
        return int((self.offsets + self.lengths).max(initial=0))

    @cached_property
    def begins_chunk(self) -> bool:
        """Some row's open chunk is empty."""
        return bool((self.offsets == 0).any())

    @cached_property
    def uniform_offset(self) -> int | None:
        """The one offset of a plain batch whose rows all stand at the same place in their chunks, else None."""
        same = self.plain and self.batch > 0 and bool((self.offsets == self.offsets[0]).all())
        return int(self.offsets[0]) if same else None

    @cached_property
    def fits_open_chunk(self) -> bool:
        """No row starts a document or goes past the end of its open chunk: all it sees is cache and tokens, in
        order.
        """
        assert self.chunk_size is not None
        return self.starts is None and bool((self.offsets + self.lengths <= self.chunk_size).all())

    @cached_property
    def document_start(self) -> np.ndarray:
        """int64 [B, L]: the index in the row of the first token of the token's document."""
        if self.starts is None:
            return np.zeros((self.batch, self.length), dtype=np.int64)
        return np.maximum.accumulate(np.where(self.starts, np.arange(self.length), 0), axis=1)

    @cached_property
    def document_positions(self) -> np.ndarray:
        """int64 [B, L]: how many tokens of its document come before the token, those of earlier batches included."""
        before = np.where(self.document_start == 0, self.positions[:, None], 0)
        return np.arange(self.length) - self.document_start + before

    @cached_property
    def end_positions(self) -> np.ndarray:
        """int64 [B]: how many tokens of its last document each row has seen after this batch."""
        rows = np.arange(self.batch)
        last = self.document_positions[rows, np.maximum(self.lengths - 1, 0)] + 1 if self.length else self.positions
        return np.where(self.lengths > 0, last, self.positions)

    @cached_property
    def chunk_positions(self) -> Tensor:
        """int64 [L], or [B, L] where the rows differ: the token's position inside its chunk."""
        positions = self.document_positions if self.uniform_offset is None else self.document_positions[0]
        return self._tensor(positions % self.chunk_size)

    @cached_property
    def token_positions(self) -> Tensor:
        """int64 [1 or B, L]: `document_positions`, where the tokens are."""
        return self._tensor(self.document_positions)

    @cached_property
    def document_starts(self) -> Tensor:
        """int64 [1 or B, L]: `document_start`, where the tokens are."""
        return self._tensor(self.document_start)

    @cached_property
    def window_reach(self) -> Tensor:
        """int64 [1 or B, L]: the tokens of its own chunk and of the one before it, up to and with the token itself."""
        size, positions = self.chunk_size, self.token_positions
        assert size is not None
        return positions % size + 1 + torch.where(positions >= size, size, 0)

    @cached_property
    def restart(self) -> Tensor | None:
        """int64 [B, L] for `timestep_norm`: `document_start` as a tensor; None when every row is one document."""
        return None if self.starts is None else self._tensor(self.document_start)

    @cached_property
    def padding(self) -> Tensor | None:
        """bool [B, L]: True where a token is padding. None when every row is full."""
        if bool((self.lengths == self.length).all()):
            return None
        return self._tensor(np.arange(self.length) >= self.lengths[:, None])

    def blocks(self, size: int) -> Blocks:
        """Every document aligned to blocks of `size` tokens."""
        cache = self.__dict__.setdefault("_blocks", {})
        if size not in cache:
            cache[size] = self._align(size)
        return cache[size]

    def _align(self, size: int) -> Blocks:
        index = np.arange(self.length)
        real = index < self.lengths[:, None]
        within = index - self.document_start
        opens = real & (within % size == 0)
        block = np.cumsum(opens, axis=1) - 1
        count = max(int(opens.sum(axis=1).max(initial=0)), 1)
        fresh = np.zeros((self.batch, count), dtype=bool)
        if self.starts is not None:
            fresh[np.nonzero(self.starts)[0], block[self.starts]] = True
        source = np.flatnonzero(real)
        row = source // max(self.length, 1)
        block_of, slot_of = block.reshape(-1)[source], (within % size).reshape(-1)[source]
        tail = np.maximum(opens.sum(axis=1) - 1, 0)
        last = (self.lengths - 1).clip(0)
        tail_length = np.zeros(self.batch, dtype=np.int64)
        if self.length:
            tail_length = np.where(self.lengths > 0, within[np.arange(self.batch), last] % size + 1, 0)
        in_tail = block_of == tail[row]
        tail_target = row * size + slot_of + size - tail_length[row]
        return Blocks(
            count=count,
            source=self._tensor(source),
            target=self._tensor((row * count + block_of) * size + slot_of),
            fresh=self._tensor(fresh),
            tail=self._tensor(tail),
            tail_source=self._tensor(source[in_tail]),
            tail_target=self._tensor(tail_target[in_tail]),
            tail_length=self._tensor(tail_length),
        )

    @cached_property
    def bins(self) -> Bins:
        """Every span of every document, packed into as few rectangles as first-fit decreasing finds."""
        return self.pack(self.chunk_spans)

    def pack(self, spans: np.ndarray) -> Bins:
        """Some of `chunk_spans`, packed as `bins` packs all."""
        sizes = spans[:, 2] + spans[:, 3]
        width = max(int(sizes.max(initial=1)), 1)
        bin_of, start_of, count = first_fit_decreasing(sizes, width)
        slots = bin_of * width + start_of
        cache_width = max(int(self.offsets.max(initial=0)), 1)
        token = ranges(spans[:, 0] * self.length + spans[:, 1], spans[:, 3])
        slot = ranges(slots + spans[:, 2], spans[:, 3])
        cached = ranges(spans[:, 0] * cache_width, spans[:, 2])
        cached_slot = ranges(slots, spans[:, 2])
        first = np.tile(np.arange(width), count)  # an empty slot attends to itself, so that its softmax is defined
        first[ranges(slots, sizes)] = np.repeat(start_of, sizes)
        return Bins(
            shape=(count, width),
            token=self._tensor(token),
            slot=self._tensor(slot),
            cached=self._tensor(cached),
            cached_slot=self._tensor(cached_slot),
            first=self._tensor(first.reshape(count, width)),
        )

    @cached_property
    def chunk_spans(self) -> np.ndarray:
        """int64 [spans, 4]: row, first token, cached keys before it, tokens. Order: by row, then by token."""
        index = np.arange(self.length)
        real = index < self.lengths[:, None]
        begins = (self.document_positions % self.chunk_size == 0) | (index == 0)
        if self.starts is not None:
            begins |= self.starts
        row, first = np.nonzero(begins & real)
        following = np.append(first[1:], 0)
        ends = np.where(np.append(row[1:] != row[:-1], True) if len(row) else row > 0, self.lengths[row], following)
        cached = np.where(first == 0, self.offsets[row], 0)
        return np.stack([row, first, cached, ends - first], axis=1)

    def open_chunk(self) -> tuple[Tensor, Tensor, Tensor, Tensor, np.ndarray]:
        """What is left open after this batch: which cached keys and which tokens stay, and where.

        Returns:
            (cached, cached_target, token, token_target, lengths): int64 index lists into the B*n cached keys, the B*L
            tokens and the B*w slots of the new cache, w = max(lengths); and the new lengths, int64 [B].
        """
        left = self.end_positions % self.chunk_size
        width, cache_width = max(int(left.max(initial=0)), 1), max(int(self.offsets.max(initial=0)), 1)
        rows = np.arange(self.batch)
        fresh = np.minimum(left, self.lengths)
        kept = left - fresh
        token = ranges(rows * self.length + self.lengths - fresh, fresh)
        token_target = ranges(rows * width + kept, fresh)
        cached, cached_target = ranges(rows * cache_width, kept), ranges(rows * width, kept)
        return self._tensor(cached), self._tensor(cached_target), self._tensor(token), self._tensor(token_target), left

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)


class PlainLayout(Layout):
    """Rows that are full, of one document each, and all at one place of it: training on streams, and most decoding.

    Everything about it is plain numbers, so that torch.compile can see through it.
    """

    starts = restart = padding = None
    plain = True

    def __init__(
        self, batch: int, length: int, device: torch.device, position: int = 0, chunk_size: int | None = None
    ) -> None:
        self.batch, self.length, self.device, self.chunk_size = batch, length, device, chunk_size
        self.position = position

    def _chunked(self, chunk_size: int) -> Layout:
        return PlainLayout(self.batch, self.length, self.device, self.position, chunk_size)

    @property
    def lengths(self) -> np.ndarray:
        return np.full(self.batch, self.length)

    @property
    def positions(self) -> np.ndarray:
        return np.full(self.batch, self.position)

    @property
    def end_positions(self) -> np.ndarray:
        return np.full(self.batch, self.position + self.length)

    @property
    def seen(self) -> Tensor:
        return torch.full((self.batch,), self.position, device=self.device)

    @property
    def fresh_rows(self) -> Tensor | None:
        return None if self.position else torch.ones(self.batch, dtype=torch.bool, device=self.device)

    @property
    def longest_offset(self) -> int:
        return self.uniform_offset

    @property
    def most_seen(self) -> int:
        return self.position

    @property
    def most_keys(self) -> int:
        return self.uniform_offset + self.length

    @property
    def begins_chunk(self) -> bool:
        return self.uniform_offset == 0

    @property
    def uniform_offset(self) -> int:
        if self.chunk_size is None:
            raise ValueError("chunk_size is needed to place tokens in chunks")
        return self.position % self.chunk_size

    @property
    def token_positions(self) -> Tensor:
        return (torch.arange(self.length, device=self.device) + self.position)[None]

    @property
    def document_starts(self) -> Tensor:
        return torch.zeros(1, self.length, dtype=torch.int64, device=self.device)

    @property
    def chunk_positions(self) -> Tensor:
        offset = self.uniform_offset
        assert self.chunk_size is not None
        return (torch.arange(self.length, device=self.device) + offset) % self.chunk_size

    @property
    def fits_open_chunk(self) -> bool:
        assert self.chunk_size is not None
        return self.uniform_offset + self.length <= self.chunk_size


def layout_of(
    batch: int,
    length: int,
    device: torch.device,
    *,
    segment_ids: Tensor | None = None,
    lengths: Sequence[int] | Tensor | np.ndarray | None = None,
    positions: Sequence[int] | Tensor | np.ndarray | None = None,
    chunk_size: int | None = None,
) -> Layout:
    """The layout of a batch, whose arguments are those of `Layout`."""
    if segment_ids is None and lengths is None and batch > 0:
        if positions is None:
            return PlainLayout(batch, length, device, 0, chunk_size)
        known = positions.tolist() if isinstance(positions, Tensor | np.ndarray) else list(positions)
        if len(known) == batch and len(set(known)) == 1:
            return PlainLayout(batch, length, device, known[0], chunk_size)
    return Layout(
        batch,
        length,
        device,
        segment_ids=segment_ids,
        lengths=lengths,
        positions=positions,
        chunk_size=chunk_size,
    )


def document_numbers(layout: Layout) -> Tensor:
    """int64 [B, L]: the number of each token's document in its row; padding is one of its own."""
    starts = np.zeros((layout.batch, layout.length), dtype=np.int64) if layout.starts is None else layout.starts
    number = np.where(np.arange(layout.length) < layout.lengths[:, None], starts.cumsum(axis=1), -1)
    return torch.from_numpy(number).to(layout.device)


def _whole_numbers(
    name: str, values: Sequence[int] | Tensor | np.ndarray | None, batch: int, default: int
) -> np.ndarray:
    if values is None:
        return np.full(batch, default, dtype=np.int64)
    array = np.asarray(values.cpu() if isinstance(values, Tensor) else values, dtype=np.int64)
    if array.shape != (batch,):
        raise ValueError(f"{name} has shape {array.shape}: it must have one value for each of {batch} rows")
    return array
