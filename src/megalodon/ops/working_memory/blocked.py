"""The working memory, batched over chunks.

Rows at one common place: what the window held is absorbed first, then the whole chunks of the batch, then each chunk
reads what was there two chunks before. Anything else (packed documents, padding, rows at different places) goes by
tables: the chunks that some document absorbs, one step after another for all documents, and the spans of tokens that
read.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megalodon.ops.layout import Layout
from megalodon.ops.prefix import Prefix
from megalodon.ops.segments import Segments
from megalodon.ops.working_memory.ragged import ragged
from megalodon.ops.working_memory.scan import Reading, absorb, read_all


def working_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory: Tensor,
    log_mass: Tensor,
    prefix: Prefix,
    layout: Layout,
    segments: Segments | None,
    use_cache: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `megalodon.ops.working_memory`."""
    with torch.autocast(q.device.type, enabled=False):
        if q.shape[1] == 0 or q.shape[0] == 0:
            return v, memory, log_mass
        if layout.plain and (layout.positions == layout.positions[0]).all():
            return _plain(q, k, v, memory, log_mass, prefix, layout, segments, use_cache)
        return ragged(q, k, v, memory, log_mass, prefix, layout, segments)


def _plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory: Tensor,
    log_mass: Tensor,
    prefix: Prefix,
    layout: Layout,
    segments: Segments | None,
    use_cache: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    size, batch, length = layout.chunk_size, q.shape[0], q.shape[1]
    assert size is not None
    position = int(layout.positions[0])
    chunk = position // size
    reads = _Reads(length, position, size)
    reads.add(chunk, memory[None])
    reading = max(chunk, 1) + 1  # the first chunk to read what is absorbed next
    last = (position + length) // size - 1  # the chunk that is before the open one at the end, and stays
    if not use_cache:  # the last token reads what was there two chunks before
        last = min(last, (position + length - 1) // size - 1)
    for keys, values, leaving in _leaving(k, v, position, size, prefix, last):
        live = keep = None
        if segments is not None:
            live, keep = _segments(segments, leaving, position, size)
        memories, masses = absorb(keys, values, memory, log_mass, [batch] * len(leaving), live, keep)
        memories = memories.unflatten(0, (-1, batch))
        memory, log_mass = memories[-1].clone(), masses[-batch:].clone()  # views would keep those of all chunks alive
        reads.add(reading, memories)
        reading += len(leaving)
    out = reads.found(q, v)
    if segments is not None:
        out = out * segments.readable[..., None, None]
    return out, memory, log_mass


def _leaving(
    k: Tensor, v: Tensor, position: int, size: int, prefix: Prefix, last: int
) -> Iterator[tuple[Tensor, Tensor, range]]:
    """The chunks before the `last` that leave the window, in runs.

    Yields:
        keys [n, B, C, H, d], values [n, B, C, H, e], their numbers.
    """
    chunk, offset = divmod(position, size)
    if chunk and last > chunk - 1:
        assert prefix.before is not None
        yield prefix.before[0][None], prefix.before[1][None], range(chunk - 1, chunk)
    if offset and last > chunk:
        assert prefix.open is not None
        head = size - offset
        keys = torch.cat([prefix.open[0][:, :offset].to(k.dtype), k[:, :head]], dim=1)
        values = torch.cat([prefix.open[1][:, :offset].to(v.dtype), v[:, :head]], dim=1)
        yield keys[None], values[None], range(chunk, chunk + 1)
    first = chunk + (offset > 0)
    if last > first:
        span = slice(first * size - position, last * size - position)
        keys, values = (x[:, span].unflatten(1, (-1, size)).transpose(0, 1) for x in (k, v))
        yield keys, values, range(first, last)


def _segments(segments: Segments, chunks: range, position: int, size: int) -> tuple[Tensor, Tensor]:
    """(live bool [n B, C], keep bool [n B]) of chunks that leave the window."""
    if chunks.start * size < position - position % size:
        place = segments.before[None]
    else:
        ends = torch.arange(chunks.start + 1, chunks.stop + 1, device=segments.bos.device) * size
        place = segments.last[:, ends - 1 - position].mT - (ends - size)[:, None]
    place = place.flatten()
    return torch.arange(size, device=place.device) >= place[:, None], place < 0


class _Reads:
    """Which tokens of a plain batch read what, chunk after chunk."""

    def __init__(self, length: int, position: int, size: int) -> None:
        self.length, self.position, self.size = length, position, size
        self.readings: list[Reading] = []
        self.memories: list[Tensor] = []

    def add(self, chunk: int, memories: Tensor) -> None:
        """The tokens of the chunks from `chunk` on read memories [n, B, H, d, e]."""
        run = len(self.memories)
        for index in range(len(memories)):
            begins = (chunk + index) * self.size - self.position
            tokens = slice(max(begins, 0), min(begins + self.size, self.length))
            if chunk + index >= 2 and tokens.start < tokens.stop:
                self.readings.append(Reading(tokens, run, index))
        self.memories.append(memories)

    def found(self, q: Tensor, v: Tensor) -> Tensor:
        """[B, L, H, e]; zero where there was nothing to read."""
        return read_all(q, v.dtype, self.readings, self.memories) if self.readings else torch.zeros_like(v)
