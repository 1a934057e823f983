"""Where a sequence can be taken up again: a state, and all tokens since.

The engine takes states at multiples of the *block* (a multiple of the chunk size), where no chunk is open, so that they
are small whatever was read. The few tokens since are read again when the sequence goes on. They are kept as segments,
because a token that was read as part of a text and one that was generated took different ways through the arithmetic
(many at once, one at a time), which differ in the last bits. Each goes the same way again, so that going on equals
never having stopped, to the bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
from torch import Tensor

from megalodon.inference.sampling import REPETITION_WINDOW
from megalodon.models import State

Kind: TypeAlias = Literal["read", "generated"]
START = hashlib.sha256(b"megalodon text 1").digest()
"""The digest of no text."""


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens, int64 [n], that came into the sequence in the same way."""

    kind: Kind
    tokens: np.ndarray


@dataclass(frozen=True)
class Snapshot:
    """A sequence that can be continued, any number of times.

    Attributes:
        state: after `position` tokens; one row. It is never changed.
        position: tokens before the tail; a multiple of the block, unless a `Session` saved it.
        digest: chained SHA-256 of the tokens before the tail (`extend_digest`); None where they are not known.
        read_only: everything before the tail was read in pieces by an engine and nothing was generated, so that the
            state is what reading that text gives, and may serve others who read it. The digest is known then.
        recent: the last tokens before the tail, at most `REPETITION_WINDOW`.
        tail: the tokens since.
        generator: state of the random generator, uint8 [n], where something was generated.
    """

    state: State
    position: int
    digest: bytes | None
    read_only: bool
    recent: tuple[int, ...]
    tail: tuple[Segment, ...]
    generator: Tensor | None = field(default=None, compare=False)

    @property
    def tokens(self) -> int:
        """Length of the sequence."""
        return self.position + sum(len(segment.tokens) for segment in self.tail)

    @property
    def text_fingerprint(self) -> str | None:
        """SHA-256 in hexadecimal that depends on every token; None where not all are known."""
        if self.digest is None:
            return None
        tail = [segment.tokens for segment in self.tail]
        return extend_digest(self.digest, np.concatenate(tail) if tail else np.array([], np.int64)).hex()

    @property
    def nbytes(self) -> int:
        """Bytes of state and tail."""
        return self.state.nbytes + sum(segment.tokens.nbytes for segment in self.tail)


def extend_digest(digest: bytes, tokens: np.ndarray) -> bytes:
    """The digest of a text whose beginning has `digest`; applied once for each block, and once for the tail."""
    return hashlib.sha256(digest + np.ascontiguousarray(tokens, dtype="<i8").tobytes()).digest()


class History:
    """The growing record from which a running sequence's snapshots are made."""

    def __init__(self, start: Snapshot, block: int) -> None:
        self.block = block
        self._base = start
        self._tail: list[tuple[Kind, list[np.ndarray]]] = []
        self._length = 0

    @property
    def base(self) -> Snapshot:
        """The last boundary, with an empty tail."""
        return self._base

    def copy(self) -> History:
        """A record that grows on its own."""
        history = History(self._base, self.block)
        history._tail = [(kind, list(parts)) for kind, parts in self._tail]
        history._length = self._length
        return history

    def append(self, kind: Kind, tokens: np.ndarray | Sequence[int]) -> None:
        """Note tokens that have come into the sequence."""
        array = np.asarray(tokens, dtype=np.int64)
        if not len(array):
            return
        if not self._tail or self._tail[-1][0] != kind:
            self._tail.append((kind, []))
        self._tail[-1][1].append(array)
        self._length += len(array)

    def rebase(self, state: State, read_only: bool) -> None:
        """Note the state after all tokens noted so far, which end at a block's end; `read_only` tells of this block."""
        tokens = np.concatenate([part for _, parts in self._tail for part in parts])
        digest = None if self._base.digest is None else extend_digest(self._base.digest, tokens)
        self.jump(state, tokens, digest, read_only)

    def jump(self, state: State, tokens: np.ndarray, digest: bytes | None, read_only: bool) -> None:
        """Note the state after `tokens` more than the last boundary, blocks whose chained digest is known."""
        recent = (*self._base.recent, *tokens[-REPETITION_WINDOW:].tolist())[-REPETITION_WINDOW:]
        position = self._base.position + len(tokens)
        self._base = Snapshot(state, position, digest, self._base.read_only and read_only, recent, ())
        self._tail, self._length = [], 0

    def recent(self) -> list[int]:
        """The last tokens, at most `REPETITION_WINDOW`."""
        tail = [part for _, parts in self._tail for part in parts]
        joined = np.concatenate([np.asarray(self._base.recent, dtype=np.int64), *tail])
        return joined[-REPETITION_WINDOW:].tolist()

    def snapshot(self, generator: Tensor | None = None) -> Snapshot:
        """The sequence as it stands."""
        base = self._base
        tail = tuple(Segment(kind, np.concatenate(parts)) for kind, parts in self._tail)
        return Snapshot(base.state, base.position, base.digest, base.read_only, base.recent, tail, generator)
