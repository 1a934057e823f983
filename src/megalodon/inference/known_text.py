"""What of one text is known already, and what of it is to be kept: a request's view of the store of states.

The text is hashed once, block by block, as it arrives: a short stretch at once, a long one in a thread beside the
engine. Later only news is looked at: states that other requests have kept since, of the same text.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import numpy as np

from megalodon.inference.branching import spacing
from megalodon.inference.prefix_cache import NEWS, PrefixStore
from megalodon.inference.snapshot import extend_digest
from megalodon.models import State

AT_ONCE = 1 << 14
"""Tokens that are hashed in the engine's thread, in a fraction of a millisecond; more are hashed beside it."""
BLOCKS_AT_ONCE, REST_SECONDS = 32, 0.001
"""Blocks that the thread beside the engine hashes in one go, and how long it then leaves the interpreter alone."""
FAR = sys.maxsize
"""As distant from a text's end as can be."""
PARTS = 8
"""Where a text leaves a known one between two kept states, the stretch between them is kept in so many parts."""


@dataclass(frozen=True)
class Place:
    """Where a known text can be taken up: tokens before it, their digest, and the state after them."""

    position: int
    digest: bytes
    state: State


class KnownText:
    """One text of one owner."""

    def __init__(self, store: PrefixStore, owner: str, block: int, wake: Callable[[], None]) -> None:
        """`wake` is called, from another thread, when a look-up is done."""
        self._store, self._owner, self._block, self._wake = store, owner.encode(), block, wake
        self._through, self._digest = -1, b""  # hashed so far
        self._places: OrderedDict[str, tuple[int, bytes]] = OrderedDict()  # of all blocks' ends ahead, ascending
        self._path: list[tuple[int, str]] = []  # kept states that this text passes
        self._own: list[tuple[int, str]] = []  # of these, what was kept for it because its end was near
        self._thinned_for = 0
        self._found: Place | None = None
        self._parts: tuple[range, int] = range(0), block
        self._pending: Future[None] | None = None
        self._told = store.told

    @property
    def looking(self) -> Future[None] | None:
        """The look-up that is being done beside the engine, if there is one."""
        return self._pending

    def search(self, position: int, digest: bytes, tokens: np.ndarray, end: int) -> bool:
        """Look for what has arrived since the last call; False while that is being done beside the engine.

        Args:
            position: where the reader stands, at a block's end. digest: of all tokens before it.
            tokens: those after it that have arrived. The last one is never part of what is known: it is to be fed.
            end: tokens of the text that are known to exist.
        """
        if self._pending is not None:
            if not self._pending.done():
                return False
            done, self._pending = self._pending, None
            done.result()
        if self._through < position:
            self._through, self._digest = position, digest
        while self._places and next(iter(self._places.values()))[0] <= position:
            self._places.popitem(last=False)
        whole = (len(tokens) - 1) // self._block * self._block
        more = tokens[self._through - position : whole]
        if len(more) > AT_ONCE:
            self._pending = self._store.beside(partial(self._look_slowly, more, end))
            self._pending.add_done_callback(lambda _: self._wake())
            return False
        if len(more):
            self._look(more, end)
        self._hear(position)
        return True

    def further(self, position: int) -> Place | None:
        """The furthest known place past `position`."""
        place, self._found = self._found, None
        if place is None or place.position <= position:
            return None
        leaves = self._store.leaves(self._key(place.digest))
        if leaves is not None:  # another text went on from here: this one leaves it before its next state
            stretch = range(place.position + 1, leaves)
            self._parts = stretch, _power_of_two((leaves - place.position) // PARTS, self._block)
        return place

    def keep(self, position: int, digest: bytes, state: State, end: int, marked: bool) -> None:
        """Keep the state at a block's end if the text may be left there, and give up what no longer is such a place.

        `marked`: a message begins before the next block's end.
        """
        stretch, part = self._parts
        apart = spacing(end - position, self._block)
        marked = marked or (position in stretch and (position - stretch.start + 1) % part == 0)
        if marked or position % apart == 0:
            key = self._key(digest)
            self._store.put(key, state, position, end, self._path)
            self._path.append((position, key))
            if not marked and position % spacing(FAR, self._block):
                self._own.append((position, key))
        if end != self._thinned_for:
            self._thinned_for = end
            self._thin_out(end)

    def _thin_out(self, end: int) -> None:
        """The text has become longer: give up what was kept for its being near the end."""
        crowded = {one for one in self._own if one[0] % spacing(end - one[0], self._block)}
        if crowded:
            self._own = [one for one in self._own if one not in crowded]
            self._path = [one for one in self._path if one not in crowded]
        for _, key in crowded:
            self._store.drop(key)

    def _look_slowly(self, tokens: np.ndarray, end: int) -> None:
        """`_look` in a thread that leaves the interpreter to the engine's most of the time.

        Hashing gives the interpreter's lock away for so short a time that the engine would not get it, and would wait
        for Python's switch interval, 5 ms, at every operation.
        """
        part = BLOCKS_AT_ONCE * self._block
        known: list[str] = []
        for start in range(0, len(tokens), part):
            known += self._hash(tokens[start : start + part])
            time.sleep(REST_SECONDS)
        self._find(known, end)

    def _look(self, tokens: np.ndarray, end: int) -> None:
        """Hash whole blocks and find the furthest known place among their ends."""
        self._find(self._hash(tokens), end)

    def _hash(self, tokens: np.ndarray) -> list[str]:
        """Note the keys of whole blocks; those that are known."""
        known: list[str] = []
        for start in range(0, len(tokens), self._block):
            self._digest = extend_digest(self._digest, tokens[start : start + self._block])
            self._through += self._block
            key = self._key(self._digest)
            self._places[key] = self._through, self._digest
            if key in self._store:
                known.append(key)
        return known

    def _find(self, known: Sequence[str], end: int) -> None:
        if known:
            self._path = [*self._path, *((self._places[key][0], key) for key in known)][-NEWS:]
            self._store.follow(self._path, end, known)
        for key in reversed(known):
            if (state := self._store.get(key)) is not None:
                self._found = Place(*self._places[key], state)
                return

    def _hear(self, here: int) -> None:
        """Find what others have kept of this text past `here` since: they may be reading it at the same time."""
        news, self._told = self._store.news(self._told)
        for key in news:
            position, digest = self._places.get(key, (0, b""))
            if position > max(here, 0 if self._found is None else self._found.position):
                state = self._store.get(key, only_memory=True)
                if state is not None:
                    self._found = Place(position, digest, state)

    def _key(self, digest: bytes) -> str:
        return hashlib.sha256(self._owner + b"\0" + digest).hexdigest()


def _power_of_two(tokens: int, block: int) -> int:
    """The largest power of two of blocks that is at most so many tokens; at least one block."""
    return (1 << (max(tokens // block, 1).bit_length() - 1)) * block
