"""Rows cut into spans, one for each chunk rank: which earlier spans reach a token, and how far away they are.

Pure arithmetic on the document borders of whole rows, which every rank knows because it made or was given the whole
batch. So only values travel, never their places.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from megalodon.ops.layout import Layout


def default_borders(length: int, ranks: int) -> tuple[int, ...]:
    """Where the spans begin and end, ranks + 1 numbers from 0 to `length`: equal spans, to a token.

    So they are whole chunks wherever ranks x C divides the length, and unpacked rows then need no exchange of an open
    chunk's keys and values. Elsewhere equal work matters more than that exchange.

    Raises:
        ValueError: there are fewer tokens than ranks.
    """
    if length < ranks:
        raise ValueError(f"a row of {length} tokens cannot be cut over {ranks} chunk ranks")
    return tuple(length * rank // ranks for rank in range(ranks + 1))


@dataclass(frozen=True)
class Reach:
    """What is remembered just before one token (or after the last), for each row of the batch.

    Attributes:
        at: the token's index in the row.
        position: int64 [B]; how many tokens of its document come before it, those of earlier batches included.
        spans: bool [R, B]; whether the state at a span's end belongs to the token's document and comes before it.
        carried: bool [B]; whether the document of the batch before is still that of this token.
    """

    at: int
    position: np.ndarray
    spans: np.ndarray
    carried: np.ndarray


class Spans:
    """How the rows of a batch are cut.

    Args:
        borders: R + 1 numbers from 0 to L; rank r has the tokens from borders[r] up to borders[r + 1].
        rank: of this process.
        segment_ids: int [B, L]; a change along L starts a document. None: each row is one.
        positions: int64 [B]; how many tokens of its first document each row has read in earlier batches.
        chunk_size: C.
        chunks_before: whole chunks before the open one that attention sees.

    Raises:
        ValueError: a span is empty.
    """

    def __init__(
        self,
        borders: tuple[int, ...],
        rank: int,
        segment_ids: Tensor | None,
        positions: np.ndarray,
        chunk_size: int,
        chunks_before: int = 0,
    ) -> None:
        if any(end <= begin for begin, end in pairwise(borders)):
            raise ValueError(f"borders={borders}: every chunk rank needs at least one token")
        self.borders, self.rank, self.chunk_size, self.chunks_before = borders, rank, chunk_size, chunks_before
        self.positions = positions
        self.batch, self.length = len(positions), borders[-1]
        self.begins = np.zeros((self.batch, self.length), dtype=np.int64)
        if segment_ids is not None:
            segments = segment_ids.cpu().numpy()
            starts = np.zeros_like(self.begins, dtype=bool)
            starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
            self.begins = np.maximum.accumulate(np.where(starts, np.arange(self.length), 0), axis=1)

    @property
    def ranks(self) -> int:
        """R."""
        return len(self.borders) - 1

    @property
    def own(self) -> slice:
        """This rank's tokens."""
        return slice(self.borders[self.rank], self.borders[self.rank + 1])

    def reach(self, rank: int) -> Reach:
        """Before the first token of a rank's span; `rank` = R: after the row."""
        at = self.borders[rank]
        begins = self.begins[:, min(at, self.length - 1)]  # after the row, the last document goes on
        carried = begins == 0
        position = np.where(carried, self.positions + at, at - begins)
        ends = np.asarray(self.borders[1:])
        reaching = (begins < ends[:, None]) & (np.arange(self.ranks) < rank)[:, None]
        return Reach(at, position, reaching, carried)

    @cached_property
    def start(self) -> Reach:
        """Before this rank's first token."""
        return self.reach(self.rank)

    @cached_property
    def end(self) -> Reach:
        """After the row's last token."""
        return self.reach(self.ranks)

    @cached_property
    def restarted(self) -> np.ndarray:
        """bool [R, B]: whether the document at the end of each span began in it."""
        ends = np.asarray(self.borders[1:])
        begins = np.asarray(self.borders[:-1])[:, None]
        return np.maximum(begins, 1) <= self.begins[:, ends - 1].T

    @cached_property
    def tail_counts(self) -> np.ndarray:
        """int64 [R, B]: tokens of each span that belong to the document at its end."""
        ends = np.asarray(self.borders[1:])
        begins = np.asarray(self.borders[:-1])[:, None]
        return ends[:, None] - np.maximum(begins, self.begins[:, ends - 1].T)

    @cached_property
    def tail(self) -> np.ndarray | None:
        """bool [B, l]: this rank's tokens that belong to the document at its span's end; None: all."""
        length = self.own.stop - self.own.start
        counts = self.tail_counts[self.rank]
        return None if (counts == length).all() else np.arange(length) >= (length - counts)[:, None]

    @cached_property
    def head(self) -> np.ndarray | None:
        """bool [B, l]: this rank's tokens that belong to the document before them; None: all."""
        begins = self.begins[:, self.own]
        same = begins == begins[:, :1]
        return None if same.all() else same

    def window(self, rank: int) -> tuple[int, int]:
        """The tokens [first, last) of the row whose keys and values a rank's span attends to without having them."""
        reach = self.reach(rank)
        seen = np.minimum(self.chunks_before, reach.position // self.chunk_size) * self.chunk_size
        width = int(np.minimum(seen + reach.position % self.chunk_size, reach.at).max(initial=0))
        return reach.at - width, reach.at

    def overlap(self, source: int, rank: int) -> tuple[int, int]:
        """Which tokens of a source's span, counted in that span, lie in the window of `rank`."""
        first, last = self.window(rank)
        begin, end = self.borders[source], self.borders[source + 1]
        low, high = max(first, begin), min(last, end)
        return (low - begin, high - begin) if low < high else (0, 0)


class SpanLayout(Layout):
    """The layout of one rank's span, which knows where the span lies in its rows."""

    def __init__(self, spans: Spans, segment_ids: Tensor | None, device: torch.device) -> None:
        own = spans.own
        super().__init__(
            spans.batch,
            own.stop - own.start,
            device,
            segment_ids=None if segment_ids is None else segment_ids[:, own],
            positions=spans.start.position,
            chunk_size=spans.chunk_size,
        )
        self.spans = spans

    def tensor(self, array: np.ndarray) -> Tensor:
        """An array on the layout's device."""
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)
