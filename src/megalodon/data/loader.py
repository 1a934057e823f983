"""Batches for training and for held-out measurement.

    loader = Loader(documents, mode="streamed", batch_size=8, sequence_length=512)
    for batch in loader:  # endless
        state = state.reset(~batch.continues)
        out = model(batch.input_ids, shift_labels=batch.labels, segment_ids=batch.segment_ids, past_key_values=state)

A batch depends on the loader's settings and its number alone: `loader.batch_at(n)`. So the position is one integer,
resuming is exact, and data-parallel ranks need not talk: the global batch of `batch_size` rows is that of one process,
and rank k of w takes rows k*batch_size/w up to (k+1)*batch_size/w of it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch

from megalodon.data.documents import DocumentSet
from megalodon.data.mixture import Mixture, another_text
from megalodon.data.packing import NO_TARGET, DocumentStream, PackedRows, Row, StreamedRows, Stretch

Mode: TypeAlias = Literal["packed", "streamed", "reset"]


@dataclass(frozen=True)
class Origin:
    """Where a row's tokens come from: documents by name, and the token of the first at which the row begins."""

    names: tuple[str, ...]
    offset: int

    def __str__(self) -> str:
        more = f" and {len(self.names) - 1} more, up to {self.names[-1]}" if len(self.names) > 1 else ""
        return f"{self.names[0]} from token {self.offset}{more}"


@dataclass(frozen=True, eq=False)
class Batch:
    """B rows of L tokens.

    `input_ids` [B, L] int64; `labels` [B, L] int64, already shifted: labels[b, t] is the target of position t, -100
    where there is none; `segment_ids` [B, L] int64, a change along L begins another document, or None where no row
    holds a change (or documents are not isolated); `continues` [B] bool, whether the row's first token follows the
    row's last token of the batch before (its state must be reset otherwise), or None for independent rows;
    `num_tokens` targets and the `num_bytes` of text they stand for (None where tokens do not map to bytes).
    `num_documents`: how many documents begin in the batch.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    segment_ids: torch.Tensor | None
    continues: torch.Tensor | None
    num_tokens: int
    num_bytes: int | None
    rows: tuple[Row, ...]
    documents: Mixture

    @property
    def num_documents(self) -> int:
        return sum(int((row.offsets == 0).sum()) for row in self.rows)

    @property
    def origins(self) -> list[Origin]:
        """Each row's documents, for error messages and logs. Made when asked for."""
        return [
            Origin(tuple(self.documents.name(i) for i in row.documents.tolist()), int(row.offsets[0]))
            for row in self.rows
            if len(row.documents)
        ]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on a device."""

        def moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            segment_ids=moved(self.segment_ids),
            continues=moved(self.continues),
        )


def make_batch(rows: list[Row], documents: Mixture, isolate: bool, continues: list[bool] | None) -> Batch:
    """Rows as tensors."""
    labels = np.stack([row.targets for row in rows])
    segments = np.stack([row.segments for row in rows])
    sizes = [row.target_bytes for row in rows if row.target_bytes is not None]
    return Batch(
        input_ids=torch.from_numpy(np.stack([row.inputs for row in rows])),
        labels=torch.from_numpy(labels),
        segment_ids=torch.from_numpy(segments) if isolate and segments[:, -1].any() else None,
        continues=None if continues is None else torch.tensor(continues),
        num_tokens=int((labels != NO_TARGET).sum()),
        num_bytes=sum(int(own.sum()) for own in sizes) if len(sizes) == len(rows) else None,
        rows=tuple(rows),
        documents=documents,
    )


class Loader:
    """Endless batches of a set of documents, or of a mixture of sets.

    `mode` "packed": independent rows; "streamed": each row reads on from batch to batch, and the trainer carries its
    state; "reset": the same batches as streamed, but nothing is carried. `isolate`: documents in a row do not see each
    other (`segment_ids` marks them, no label crosses a border); without it a row is one text. `batch_size` counts the
    rows of all `world_size` ranks together. `seed` orders the documents anew in every epoch; with `shuffle=False` they
    stay in the corpus's order.

    Raises ValueError for sizes that are not positive or do not divide, and for too few tokens.
    """

    def __init__(
        self,
        documents: DocumentSet | Mixture,
        *,
        mode: Mode,
        batch_size: int,
        sequence_length: int,
        seed: int = 0,
        isolate: bool = True,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if mode not in get_args(Mode):
            raise ValueError(f"mode is {mode!r}; give packed, streamed or reset")
        self.own_rows = own_rows(batch_size, sequence_length, rank, world_size)
        needed = sequence_length + 1 if mode == "packed" else max(batch_size, sequence_length + 1)
        documents = Mixture.of(documents)
        if documents.num_tokens < needed:
            raise ValueError(
                f"the documents hold {documents.num_tokens} tokens; batch_size {batch_size} and sequence_length "
                f"{sequence_length} in mode {mode} need at least {needed}: give a larger corpus or smaller sizes"
            )
        self.documents, self.isolate, self.mode = documents, isolate, mode
        kind = PackedRows if mode == "packed" else StreamedRows
        self.layout = kind(DocumentStream(documents, seed, shuffle), batch_size, sequence_length)
        self.settings: dict[str, Any] = {
            "mode": mode,
            "batch_size": batch_size,
            "sequence_length": sequence_length,
            "seed": seed,
            "isolate": isolate,
            "shuffle": shuffle,
            **documents.identity(),
        }
        self.step = 0

    @property
    def epoch(self) -> float:
        """Passes over the documents so far; of a mixture, rounds."""
        return self._tokens / self.layout.stream.length

    @property
    def epochs(self) -> dict[str, float]:
        """Passes over each set of a mixture so far, by its name."""
        return self.documents.epochs(self._tokens)

    @property
    def _tokens(self) -> int:
        return self.step * self.layout.rows * self.layout.sequence_length

    def batch_at(self, step: int) -> Batch:
        """This rank's part of batch number `step`, whatever the loader's position."""
        stretches = [self.layout.stretches(step, row) for row in self.own_rows]
        rows = [self.layout.stream.row(stretch, self.isolate) for stretch in stretches]
        continues = None
        if self.mode == "streamed":
            continues = [self.layout.continues(step, row, self.isolate) for row in self.own_rows]
        return make_batch(rows, self.documents, self.isolate, continues)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self.batch_at(self.step)
        self.step += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position, with the settings it belongs to; plain values. The same on every rank."""
        return {"step": self.step} | self.settings

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position: the next batch is the one that was next then. The number of ranks may differ.

        Raises ValueError naming each setting that differs from those the position was saved with, or the text if it is
        another; where its files lie, and when they were written, does not matter."""
        changed = [
            f"{key} was {state.get(key)!r} and is {value!r}"
            for key, value in self.settings.items()
            if key not in self.documents.identity() and state.get(key) != value
        ]
        if (told := another_text(state, self.settings, "the training text")) is not None:
            changed.append(told)
        if changed:
            raise ValueError(
                f"the loader's saved position belongs to something else: {'; '.join(changed)}. "
                "Resume with the settings and the text of the checkpoint, or start a new run"
            )
        step = state.get("step")
        if not isinstance(step, int) or step < 0:
            raise ValueError(f"the loader's saved step is {step!r}, not a number of batches")
        self.step = step


def own_rows(batch_size: int, sequence_length: int, rank: int, world_size: int) -> range:
    """The rows of the global batch that `rank` of `world_size` makes; checks the sizes."""
    for name, value in (("batch_size", batch_size), ("sequence_length", sequence_length), ("world_size", world_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be 1 or more")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}; with world_size {world_size} it must be 0 to {world_size - 1}")
    if batch_size % world_size:
        raise ValueError(f"batch_size is {batch_size}; it must be a multiple of world_size {world_size}")
    share = batch_size // world_size
    return range(rank * share, (rank + 1) * share)


def held_out_batches(
    documents: DocumentSet,
    *,
    batch_size: int,
    sequence_length: int,
    max_tokens: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    carry: bool = True,
) -> Iterator[Batch]:
    """Every text of the documents once, in streamed batches: the same ones every time.

    A document is read from its beginning to its end in one row, with its state carried, so that its loss does not
    depend on `batch_size` or `sequence_length`; rows get documents so that they are about equally long. The ids that
    end documents are no text: they are neither read nor predicted. All batches have the shape [B, L]; what is missing
    is filled up with id 0 in a segment of its own without labels.

    Args:
        max_tokens: read only so many tokens, the first ones of the set.
        carry: without it, nothing is carried from one batch to the next, so that every `sequence_length` tokens of a
            document stand alone.
    """
    own = own_rows(batch_size, sequence_length, rank, world_size)
    texts = documents.without_ends().first(max_tokens)
    shares = _shared_out(texts, batch_size)
    streams = [DocumentStream(texts.chosen(share), seed=0, shuffle=False) for share in shares]
    longest = max((stream.length for stream in streams), default=0)
    for start in range(0, longest, sequence_length):
        rows, continues = [], []
        for number in own:
            begin, end = (min(place, streams[number].length) for place in (start, start + sequence_length))
            row = _padded(streams[number], Stretch(0, begin, end), sequence_length)
            rows.append(replace(row, documents=shares[number][row.documents]))
            goes_on = 0 < begin < end and not streams[number].begins_document(0, begin)
            continues.append(goes_on)
        yield make_batch(rows, Mixture.of(texts), True, continues if carry else None)


def _shared_out(documents: DocumentSet, rows: int) -> list[np.ndarray]:
    """For each row the documents [k] that it gets, ascending: the longest first, each to the row that is shortest."""
    chosen: list[list[int]] = [[] for _ in range(rows)]
    lengths = [(0, row) for row in range(rows)]
    for number in np.argsort(-documents.lengths, kind="stable").tolist():
        length, row = heapq.heappop(lengths)
        chosen[row].append(number)
        heapq.heappush(lengths, (length + int(documents.lengths[number]), row))
    return [np.array(sorted(own), dtype=np.int64) for own in chosen]


def _padded(stream: DocumentStream, stretch: Stretch, length: int) -> Row:
    """The row of a stretch that may be shorter than `length`, even empty, filled up."""
    missing = length - (stretch.stop - stretch.start)
    if missing == length:
        nothing, padding = np.zeros(0, dtype=np.int64), np.zeros(length, dtype=np.int64)
        return Row(padding, padding + NO_TARGET, padding, nothing, nothing, nothing, padding)
    row = stream.row([stretch], isolate=True)
    if not missing:
        return row
    return replace(
        row,
        inputs=np.pad(row.inputs, (0, missing)),
        targets=np.pad(row.targets, (0, missing), constant_values=NO_TARGET),
        segments=np.pad(row.segments, (0, missing), constant_values=row.segments[-1] + 1),
        target_bytes=None if row.target_bytes is None else np.pad(row.target_bytes, (0, missing)),
    )
