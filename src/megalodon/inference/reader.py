"""Reading a text into a sequence piece by piece, the same pieces whatever else the engine does meanwhile.

Pieces end at multiples of `piece` tokens of the sequence, so they depend on the text alone. The last token is kept back
for the first decoding step. What a snapshot has in its tail is read again, generated tokens one by one.
"""

from __future__ import annotations

import bisect
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from torch import Tensor

from megalodon.inference.feed import TokenFeed
from megalodon.inference.known_text import KnownText
from megalodon.inference.snapshot import History, Kind, Snapshot
from megalodon.models import State

LOOKED_UP = 1 << 17
"""Tokens that are taken ahead of reading to be looked up."""
PATIENCE = 0.05
"""Seconds that a text which has been known so far may take to arrive further before reading begins: what comes may be
known as well."""


@dataclass(frozen=True)
class Piece:
    """Tokens to run the model on, many at once."""

    tokens: np.ndarray


@dataclass(frozen=True)
class Replay:
    """Tokens to decode one by one without choosing."""

    tokens: tuple[tuple[Kind, int], ...]


@dataclass(frozen=True)
class Ready:
    """Everything but this token has been fed; the first decoding step feeds it."""

    kind: Kind
    token: int


@dataclass(frozen=True)
class Finished:
    """All has been read, and there is nothing to go on from: nothing is to be generated, or the text is empty. The last
    tokens may be unfed, in the snapshot's tail."""


@dataclass(frozen=True)
class Waiting:
    """For more of the text to arrive, or to be looked up."""


Next: TypeAlias = "Piece | Replay | Ready | Finished | Waiting"


class Reader:
    """The text part of one request.

    Attributes:
        state: after all that was fed; None while the sequence is in a slot.
        position: tokens fed.
        cached: tokens that were not fed because the cache had the state after them.
        arrived: tokens of the sequence known so far.
    """

    def __init__(
        self, start: Snapshot, feed: TokenFeed, block: int, piece: int, known: KnownText | None, only: bool
    ) -> None:
        """
        Args:
            start: the sequence to go on from.
            feed: the text.
            block, piece: as in `block_and_piece`.
            known: what of the sequence is known already, and where its states are kept; None for neither.
            only: nothing will be generated, so that tokens past the last block boundary need not be fed.
        """
        self.state: State | None = start.state
        self.position = start.position
        self.cached = 0
        self.arrived = start.tokens
        self.history = History(
            Snapshot(start.state, start.position, start.digest, start.read_only, start.recent, ()), block
        )
        self._generator: Tensor | None = start.generator
        self._feed, self._block, self._piece, self._known, self._only = feed, block, piece, known, only
        self._first, self._patient_until = start.tokens, 0.0
        self._closed = False
        self._stages: deque[np.ndarray | Replay] = deque()
        self._held: int | None = None
        self._buffer = np.array([], dtype=np.int64)
        self._plan(start)

    def _plan(self, start: Snapshot) -> None:
        segments = list(start.tail)
        if segments and segments[-1].kind == "read":
            self._buffer = segments.pop().tokens
        elif segments:
            self._held = int(segments[-1].tokens[-1])
        carried: list[tuple[Kind, int]] = []
        for i, segment in enumerate(segments):
            if segment.kind == "read":
                self._stages.append(segment.tokens[:-1])
                carried = [("read", int(segment.tokens[-1]))]
            else:
                tokens = segment.tokens[:-1] if self._held is not None and i == len(segments) - 1 else segment.tokens
                if replay := (*carried, *(("generated", token) for token in tokens.tolist())):
                    self._stages.append(Replay(replay))
                carried = []

    def next(self, most: int) -> Next | None:
        """What to do now; None if that is a piece of more than `most` tokens, which is then still to come.

        Report a piece with `fed`, replayed tokens with `replayed`.
        """
        self._take()
        if self._is_enough():
            return Finished() if self._closed else Waiting()
        while self._stages:
            stage = self._stages.popleft()
            if isinstance(stage, Replay):
                return stage
            if len(stage):
                length = min(self._room(), len(stage))
                self._stages.appendleft(stage[length:] if length <= most else stage)
                return Piece(stage[:length]) if length <= most else None
        if self._held is not None:
            if not len(self._buffer):
                return Ready("generated", self._held) if self._closed else Waiting()
            held, self._held = self._held, None
            return Replay((("generated", held),))
        return self._next_of_text(most)

    def _next_of_text(self, most: int) -> Next | None:
        if not self._jump() or (not self._closed and time.monotonic() < self._patient_until):
            return Waiting()
        if self._is_enough():  # what the cache had may be all that was needed
            return Finished() if self._closed else Waiting()
        room = self._room()
        length = min(room, len(self._buffer) - 1)
        if length == room or (self._closed and length > 0):
            if length > most:
                return None
            piece, self._buffer = self._buffer[:length], self._buffer[length:]
            return Piece(piece)
        if not self._closed:
            return Waiting()
        return Ready("read", int(self._buffer[0])) if len(self._buffer) else Finished()

    def fed(self, tokens: np.ndarray, state: State) -> None:
        """A piece has been run; `state` is what it left."""
        self.state = state
        self.position += len(tokens)
        self.history.append("read", tokens)
        if self.position % self._block == 0:
            self.state = compact(state)
            self.history.rebase(self.state, read_only=True)
            self._keep()

    def replayed(self, kind: Kind, token: int) -> None:
        """One token has been decoded in a slot."""
        self.position += 1
        self.history.append(kind, [token])

    def snapshot(self) -> Snapshot:
        """The sequence with all that has arrived, fed or not."""
        history = self.history.copy()
        for stage in self._stages:
            if isinstance(stage, Replay):
                for kind, token in stage.tokens:
                    history.append(kind, [token])
            else:
                history.append("read", stage)
        if self._held is not None:
            history.append("generated", [self._held])
        history.append("read", self._buffer)
        return history.snapshot(self._generator)

    def _take(self) -> None:
        enough = 2 * max(self._block, self._piece)
        if self._closed or len(self._buffer) > (enough if self._known is None else max(enough, LOOKED_UP)):
            return
        tokens, self._closed = self._feed.take()
        self.arrived += len(tokens)
        if len(self._buffer) and len(tokens):
            tokens = np.concatenate([self._buffer, tokens])
        self._buffer = tokens if len(tokens) else self._buffer

    def _unfed(self) -> int:
        stages = sum(len(stage.tokens) if isinstance(stage, Replay) else len(stage) for stage in self._stages)
        return stages + (self._held is not None) + len(self._buffer)

    def _is_enough(self) -> bool:
        """Nothing will be generated, and no more than one block is unfed: a snapshot's tail has room for it."""
        return self._only and self.position % self._block + self._unfed() <= self._block

    def _room(self) -> int:
        return self._piece - self.position % self._piece

    @property
    def looking(self) -> Future[None] | None:
        """The look-up of the text that is being done beside the engine, if there is one."""
        return None if self._known is None else self._known.looking

    def _jump(self) -> bool:
        """Go to the furthest boundary of the arrived text whose state is known; False while that is looked up."""
        base = self.history.base
        if self._known is None or self.position % self._block or not base.read_only or base.digest is None:
            return True
        if not self._known.search(self.position, base.digest, self._buffer, self.arrived):
            return False
        place = self._known.further(self.position)
        if place is not None:
            length = place.position - self.position
            self.history.jump(place.state, self._buffer[:length], place.digest, read_only=True)
            self.state, self.position, self._buffer = place.state, place.position, self._buffer[length:]
            self.cached += length
            self._patient_until = time.monotonic() + PATIENCE
        return True

    def _keep(self) -> None:
        base = self.history.base
        if self._known is not None and self.state is not None and base.read_only and base.digest is not None:
            here, marks = self.position - self._first, self._feed.marks
            at = bisect.bisect_left(marks, here)
            marked = at < len(marks) and marks[at] < here + self._block
            self._known.keep(self.position, base.digest, self.state, self.arrived, marked)


def compact(state: State) -> State:
    """The same state in memory of its own, without room for keys and values to come."""
    tensors = {name: tensor.clone() for name, tensor in state.state_dict().items()}
    return type(state).from_state_dict(tensors, state.dimensions)


def empty_snapshot(state: State, digest: bytes) -> Snapshot:
    """The beginning of every text; `state` is one that has read nothing."""
    return Snapshot(state, 0, digest, True, (), ())


def block_and_piece(chunk: int, piece: int) -> tuple[int, int]:
    """(block, piece): tokens between two places where a sequence can be taken up, and tokens read at once.

    The piece is the largest number up to `piece` that divides the chunk size, or that the chunk size divides; the
    block is the larger of piece and chunk.

    Raises:
        ValueError: for a piece below 1.
    """
    if piece < 1:
        raise ValueError(f"piece is {piece}; it must be 1 or more")
    if piece >= chunk:
        return (piece // chunk * chunk,) * 2
    return chunk, max(size for size in range(1, piece + 1) if chunk % size == 0)
