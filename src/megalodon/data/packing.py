"""Documents laid end to end, epoch after epoch, and cut into rows of equal length. Pure index arithmetic on NumPy.

An epoch is all documents in a seeded random order, one after another: its tokens stand at positions 0 to T-1. Every
reader below takes stretches of epochs, so that each token is an input exactly once per epoch, and any batch can be made
without those before it.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from megalodon.data.split import DocumentSet

NO_TARGET = -100
KEPT_EPOCHS = 4


class Stretch(NamedTuple):
    """Positions [start, stop) of one epoch."""

    epoch: int
    start: int
    stop: int


@dataclass(frozen=True)
class Row:
    """One row of a batch. `inputs`, `targets`, `segments` [L] int64; targets are the next tokens, NO_TARGET where there
    is none. The row is made of pieces of documents: piece i begins at `borders[i]` in the row with token `offsets[i]`
    of the document at `documents[i]` of the set."""

    inputs: np.ndarray
    targets: np.ndarray
    segments: np.ndarray
    borders: np.ndarray
    documents: np.ndarray
    offsets: np.ndarray


class DocumentStream:
    """The documents of a set in the order of each epoch, drawn by `seed` (as they stand where `shuffle` is False)."""

    def __init__(self, documents: DocumentSet, seed: int, shuffle: bool) -> None:
        self.documents, self.seed, self.shuffle = documents, seed, shuffle
        self.length = documents.num_tokens
        self._before = documents.starts - documents.corpus.offsets[documents.indices]  # only cut documents have any
        self._layouts: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(order [n], begins [n+1]): the documents of an epoch, and the positions at which they begin."""
        if epoch not in self._layouts:
            n = len(self.documents)
            order = np.random.default_rng([self.seed, 0, epoch]).permutation(n) if self.shuffle else np.arange(n)
            begins = np.concatenate([[0], np.cumsum(self.documents.lengths[order])])
            self._layouts[epoch] = (order, begins)
            if len(self._layouts) > KEPT_EPOCHS:
                self._layouts.popitem(last=False)
        return self._layouts[epoch]

    def begins_document(self, epoch: int, position: int) -> bool:
        """Whether a document begins at this position."""
        begins = self.layout(epoch)[1]
        return bool(begins[np.searchsorted(begins, position)] == position)

    def row(self, stretches: list[Stretch], isolate: bool) -> Row:
        """One row of these stretches, each a segment or more of its own.

        A stretch's last target is the token that follows it in its epoch. With `isolate`, the last token of a document
        has no target; without, its target is the first token of the next document.
        """
        parts = [self._read(stretch, isolate) for stretch in stretches]
        if len(parts) == 1:
            return parts[0]
        at = np.cumsum([0, *(len(part.inputs) for part in parts)])
        first = np.cumsum([0, *(part.segments[-1] + 1 for part in parts)])
        return Row(
            inputs=np.concatenate([part.inputs for part in parts]),
            targets=np.concatenate([part.targets for part in parts]),
            segments=np.concatenate([part.segments + first[i] for i, part in enumerate(parts)]),
            borders=np.concatenate([part.borders + at[i] for i, part in enumerate(parts)]),
            documents=np.concatenate([part.documents for part in parts]),
            offsets=np.concatenate([part.offsets for part in parts]),
        )

    def _read(self, stretch: Stretch, isolate: bool) -> Row:
        epoch, start, stop = stretch
        order, begins = self.layout(epoch)
        seen = min(stop + 1, self.length)  # one token more, for the last target
        first, last = np.searchsorted(begins, [start, seen - 1], side="right") - 1
        documents = order[first : last + 1]
        piece_begins = np.maximum(begins[first : last + 1], start)
        inside = piece_begins - begins[first : last + 1]  # tokens of the document in front of the piece
        sources = self.documents.starts[documents] + inside
        borders = piece_begins - start
        if len(documents) == 1:
            read = self.documents.corpus.tokens[sources[0] : sources[0] + seen - start].astype(np.int64)
        else:
            pieces = np.diff(borders, append=seen - start)
            index = np.repeat(sources - borders, pieces) + np.arange(seen - start)
            read = self.documents.corpus.tokens[index].astype(np.int64)
        targets = np.full(stop - start, NO_TARGET, dtype=np.int64)
        targets[: len(read) - 1] = read[1:]
        if isolate:
            targets[borders[1:] - 1] = NO_TARGET
        here = borders < stop - start  # the token read for the last target may belong to one document more
        segments = np.zeros(stop - start, dtype=np.int64)
        segments[borders[here][1:]] = 1
        return Row(
            inputs=read[: stop - start],
            targets=targets,
            segments=np.cumsum(segments),
            borders=borders[here],
            documents=documents[here],
            offsets=(self._before[documents] + inside)[here],
        )


@dataclass(frozen=True)
class PackedRows:
    """Independent rows: the endless stream of epochs cut into windows of `sequence_length`, taken in random order.

    Windows are shuffled within blocks of about an epoch (T // sequence_length windows), so the windows of blocks
    0 .. k-1 are exactly the stream's first tokens.
    """

    stream: DocumentStream
    rows: int
    sequence_length: int

    def stretches(self, step: int, row: int) -> list[Stretch]:
        block_size = max(1, self.stream.length // self.sequence_length)
        block, within = divmod(step * self.rows + row, block_size)
        if self.stream.shuffle:
            within = int(window_order(self.stream.seed, block, block_size)[within])
        window = block * block_size + within
        return endless(0, self.stream.length, window * self.sequence_length, self.sequence_length)

    def continues(self, step: int, row: int, isolate: bool) -> bool:
        return False


@lru_cache(maxsize=KEPT_EPOCHS)
def window_order(seed: int, block: int, size: int) -> np.ndarray:
    """The order of a block's windows."""
    return np.random.default_rng([seed, 1, block]).permutation(size)


@dataclass(frozen=True)
class StreamedRows:
    """Rows that read on: row r of R has positions r*T//R up to (r+1)*T//R of every epoch, and reads them epoch after
    epoch without a gap. So all rows are equally long whatever the documents' lengths, at the price that each epoch cuts
    R - 1 documents in two."""

    stream: DocumentStream
    rows: int
    sequence_length: int

    def span(self, row: int) -> tuple[int, int]:
        return row * self.stream.length // self.rows, (row + 1) * self.stream.length // self.rows

    def stretches(self, step: int, row: int) -> list[Stretch]:
        return endless(*self.span(row), step * self.sequence_length, self.sequence_length)

    def continues(self, step: int, row: int, isolate: bool) -> bool:
        """Whether the row's first token follows its last token of the step before, in the same document if isolated."""
        if step == 0 or not isolate:
            return step > 0
        start, stop = self.span(row)
        epoch, inside = divmod(step * self.sequence_length, stop - start)
        return inside > 0 and not self.stream.begins_document(epoch, start + inside)


def endless(start: int, stop: int, position: int, count: int) -> list[Stretch]:
    """`count` tokens from `position` of the endless repetition of [start, stop), one turn per epoch."""
    stretches = []
    while count:
        epoch, inside = divmod(position, stop - start)
        taken = min(count, stop - start - inside)
        stretches.append(Stretch(epoch, start + inside, start + inside + taken))
        position, count = position + taken, count - taken
    return stretches
