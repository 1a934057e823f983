"""Documents laid end to end, epoch after epoch, and cut into rows of equal length. Pure index arithmetic on NumPy.

An epoch is all documents in a seeded random order, one after another: its tokens stand at positions 0 to T-1. Every
reader below takes stretches of epochs, so that each token is an input exactly once per epoch, and any batch can be made
without those before it. Of a mixture an epoch is a round, in which each set has its share of the positions.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from megalodon.data.documents import DocumentSet
from megalodon.data.mixture import Mixture

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
    is none; `target_bytes` [L] int64 of text that they stand for, 0 where there is none, or None where it is unknown.
    The row is made of pieces of documents: piece i begins at `borders[i]` in the row with token `offsets[i]` of
    document number `documents[i]`."""

    inputs: np.ndarray
    targets: np.ndarray
    segments: np.ndarray
    borders: np.ndarray
    documents: np.ndarray
    offsets: np.ndarray
    target_bytes: np.ndarray | None = None


class Layout(NamedTuple):
    """The pieces [n] of an epoch in their order: of which set, which document by its number in the mixture, from which
    place of the set's tokens; and the positions [n+1] of the epoch at which they begin."""

    sources: np.ndarray
    documents: np.ndarray
    places: np.ndarray
    begins: np.ndarray


class DocumentStream:
    """Documents in the order of each epoch, drawn by `seed` (as they stand where `shuffle` is False)."""

    def __init__(self, documents: DocumentSet | Mixture, seed: int, shuffle: bool) -> None:
        self.documents, self.seed, self.shuffle = Mixture.of(documents), seed, shuffle
        self.length = sum(self.documents.shares)
        self._layouts: OrderedDict[int, Layout] = OrderedDict()

    def layout(self, epoch: int) -> Layout:
        """The pieces of an epoch, and the positions at which they begin."""
        if epoch not in self._layouts:
            self._layouts[epoch] = self._round(epoch)
            if len(self._layouts) > KEPT_EPOCHS:
                self._layouts.popitem(last=False)
        return self._layouts[epoch]

    def _round(self, epoch: int) -> Layout:
        parts = [
            self._share(number, stretch)
            for number, share in enumerate(self.documents.shares)
            for stretch in endless(0, self.documents.sets[number].num_tokens, epoch * share, share)
        ]
        sources, documents, places, lengths = (np.concatenate(column) for column in zip(*parts, strict=True))
        if len(self.documents.sets) > 1:
            order = self._mixed(epoch, sources, lengths)
            sources, documents, places, lengths = (column[order] for column in (sources, documents, places, lengths))
        return Layout(sources, documents, places, np.concatenate([[0], np.cumsum(lengths)]))

    def _share(self, number: int, stretch: Stretch) -> tuple[np.ndarray, ...]:
        """(sources, documents, places, lengths) of a stretch of one set's own epoch."""
        own = self.documents.sets[number]
        order = np.arange(len(own))
        if self.shuffle:
            # The draws of a single set are those of a set without others.
            keys = [self.seed, 0, stretch.epoch, *([number + 1] if len(self.documents.sets) > 1 else [])]
            order = np.random.default_rng(keys).permutation(len(own))
        begins = np.concatenate([[0], np.cumsum(own.lengths[order])])
        first, last = np.searchsorted(begins, [stretch.start, stretch.stop - 1], side="right") - 1
        chosen = order[first : last + 1]
        cut_front = np.maximum(stretch.start - begins[first : last + 1], 0)
        cut_back = np.maximum(begins[first + 1 : last + 2] - stretch.stop, 0)
        sources = np.full(len(chosen), number)
        lengths = own.lengths[chosen] - cut_front - cut_back
        return sources, chosen + self.documents.first[number], own.starts[chosen] + cut_front, lengths

    def _mixed(self, epoch: int, sources: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """An order for the pieces of several sets: drawn, or each set evenly over the round."""
        if self.shuffle:
            return np.random.default_rng([self.seed, 2, epoch]).permutation(len(sources))
        middles = np.empty(len(sources))
        for number in range(len(self.documents.sets)):
            own = sources == number
            ends = np.cumsum(lengths[own])
            middles[own] = (ends - lengths[own] / 2) / max(1, lengths[own].sum())
        return np.argsort(middles, kind="stable")

    def begins_document(self, epoch: int, position: int) -> bool:
        """Whether a document begins at this position."""
        begins = self.layout(epoch).begins
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
            target_bytes=_joined([part.target_bytes for part in parts]),
        )

    def _read(self, stretch: Stretch, isolate: bool) -> Row:
        epoch, start, stop = stretch
        layout = self.layout(epoch)
        seen = min(stop + 1, self.length)  # one token more, for the last target
        first, last = np.searchsorted(layout.begins, [start, seen - 1], side="right") - 1
        pieces = slice(first, last + 1)
        piece_begins = np.maximum(layout.begins[pieces], start)
        sources, documents = layout.sources[pieces], layout.documents[pieces]
        places = layout.places[pieces] + piece_begins - layout.begins[pieces]
        borders = piece_begins - start
        sizes = np.diff(borders, append=seen - start)
        index = np.repeat(places - borders, sizes) + np.arange(seen - start)
        source_of = np.repeat(sources, sizes)
        read, read_bytes = self.documents.tokens(source_of, index), self.documents.text_sizes(source_of, index)
        targets = np.full(stop - start, NO_TARGET, dtype=np.int64)
        targets[: len(read) - 1] = read[1:]
        if isolate:
            targets[borders[1:] - 1] = NO_TARGET
        target_bytes = None
        if read_bytes is not None:
            target_bytes = np.zeros(stop - start, dtype=np.int64)
            target_bytes[: len(read) - 1] = read_bytes[1:]
            target_bytes[targets == NO_TARGET] = 0
        here = borders < stop - start  # the token read for the last target may belong to one document more
        segments = np.zeros(stop - start, dtype=np.int64)
        segments[borders[here][1:]] = 1
        return Row(
            inputs=read[: stop - start],
            targets=targets,
            segments=np.cumsum(segments),
            borders=borders[here],
            documents=documents[here],
            offsets=places[here] - self._beginnings(sources[here], documents[here]),
            target_bytes=target_bytes,
        )

    def _beginnings(self, sources: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """The places in their sets' tokens at which whole documents begin."""
        if len(self.documents.sets) == 1:
            only = self.documents.sets[0]
            return only.corpus.offsets[only.indices[documents]]
        found = np.empty(len(documents), dtype=np.int64)
        for i, (source, number) in enumerate(zip(sources.tolist(), documents.tolist(), strict=True)):
            own = self.documents.sets[source]
            found[i] = own.corpus.offsets[own.indices[number - self.documents.first[source]]]
        return found


def _joined(parts: list[np.ndarray | None]) -> np.ndarray | None:
    known = [part for part in parts if part is not None]
    return np.concatenate(known) if len(known) == len(parts) else None


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
