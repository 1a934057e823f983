"""What is read: up to one piece's worth of tokens a step, from the requests that are reading, in turn.

A request is here from when it may begin until its text has been read. While tokens of it that were once generated are
decoded again (`decoding`), it keeps its turn and waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, wait
from functools import partial

import numpy as np
import torch

from megalodon.inference.decoding import Decoding
from megalodon.inference.hidden import Watch
from megalodon.inference.known_text import KnownText
from megalodon.inference.prefix_cache import PrefixStore
from megalodon.inference.reader import Finished, Piece, Reader, Ready, Replay, Waiting
from megalodon.inference.request import Failure, Progress
from megalodon.inference.snapshot import Snapshot
from megalodon.inference.work import Counters, RefusedError, Work
from megalodon.models import CausalLM

READERS_PER_SLOT = 4
"""So many requests that need no slot may read at once, for each slot: most of them wait for their text to arrive."""
LEAST_COST = 32
"""A piece of fewer tokens takes about as long as one of so many."""
TOO_MUCH = -1
"""The cost of a piece that is more than what is left of a step's."""


class Reading:
    """The requests that are reading.

    Attributes:
        empty: where a text without a context begins.
        block, piece: tokens between two places where a sequence can be taken up, and tokens read at once.
        prefixes: states of texts read before, or None.
    """

    def __init__(
        self,
        model: CausalLM,
        decoding: Decoding,
        empty: Snapshot,
        piece: int,
        counters: Counters,
        wake: Callable[[], None],
        prefixes: PrefixStore | None = None,
        share_prefixes: bool = False,
    ) -> None:
        """
        Args:
            model: in evaluation mode.
            decoding: where sequences go whose text is read.
            empty, piece, prefixes: the attributes.
            counters: what has been read.
            wake: called, from any thread, when there is something to do again.
            share_prefixes: owners use one another's.
        """
        self.empty, self.block, self.piece, self.prefixes = empty, decoding.block, piece, prefixes
        self._model, self._decoding, self._counters, self._share = model, decoding, counters, share_prefixes
        self._wake = wake
        self._works: deque[Work] = deque()

    def __len__(self) -> int:
        return len(self._works)

    @property
    def reserved(self) -> int:
        """Slots that requests here are going to take."""
        return sum(work.reserved for work in self._works)

    @property
    def has_room(self) -> bool:
        """Whether one more request that needs no slot may begin."""
        return sum(work.slots_needed == 0 for work in self._works) < READERS_PER_SLOT * self._decoding.slots

    def works(self) -> list[Work]:
        """All that are reading."""
        return list(self._works)

    def forget_ended(self) -> None:
        """Let go of requests that have ended."""
        if any(work.ended for work in self._works):
            self._works = deque(work for work in self._works if not work.ended)

    def add(self, work: Work) -> None:
        """Begin to read a request's text."""
        if work.guarded(partial(self._begin, work)):
            self._works.append(work)

    def _begin(self, work: Work) -> bool:
        request, known = work.request, None
        if self.prefixes is not None and request.watch is None:  # a watch sees all of the text
            known = KnownText(self.prefixes, "" if self._share else request.owner, self.block, self._wake)
        only = request.generation is None and request.watch is None
        work.reader = Reader(request.start or self.empty, request.feed, self.block, self.piece, known, only)
        work.reserved = work.slots_needed
        return True

    def step(self) -> bool:
        """Read up to one piece's worth of tokens, from the requests in turn; False if nothing could be read."""
        budget, progressed, passed = self.piece, False, 0
        while self._works and budget > 0 and passed < len(self._works):
            work = self._works.popleft()
            cost = work.guarded(partial(self._turn, work, budget)) or 0
            if cost == TOO_MUCH:  # first in the next step
                self._works.appendleft(work)
                return True
            passed = 0 if cost else passed + 1
            progressed = progressed or cost > 0
            budget -= cost
        return progressed

    def await_look_up(self, seconds: float) -> bool:
        """Wait for a text to be looked up, for so long at most; False if none is being looked up."""
        looking = [work.reader.looking for work in self._works if work.reader is not None]
        pending = [look_up for look_up in looking if look_up is not None]
        wait(pending, seconds, FIRST_COMPLETED)
        return bool(pending)

    def _turn(self, work: Work, budget: int) -> int:
        """Do the next thing for a request, and put it back if it goes on reading; its cost in tokens."""
        reader = work.reader
        assert reader is not None
        if reader.state is None:  # its sequence is in a slot, being decoded again
            self._works.append(work)
            return 0
        before = reader.cached
        upcoming = reader.next(budget)
        if upcoming is None:
            return TOO_MUCH
        self._check_length(work, reader)
        self._counters.cached_tokens += reader.cached - before
        match upcoming:
            case Piece(tokens):
                self._run_piece(work, reader, tokens)
                self._works.append(work)
                return max(len(tokens), LEAST_COST)
            case Replay(tokens):
                self._decoding.replay(work, reader, tokens)
                self._works.append(work)
                return 1
            case Ready(kind, token):
                if (watch := work.request.watch) is not None:
                    self._watch_last(watch, reader, token)
                if work.request.generation is None:
                    self._finish(work, reader)
                    return 1
                self._decoding.generate(work, reader, (kind, token))
                return 1
            case Finished():
                self._finish(work, reader)
                return 1
            case Waiting():
                self._works.append(work)
        return 0

    def _check_length(self, work: Work, reader: Reader) -> None:
        most = work.request.max_prompt_tokens
        known = 0 if work.request.start is None else work.request.start.tokens
        if most is not None and reader.arrived - known > most:
            raise RefusedError(Failure.too_long, f"the text has more than {most} tokens")

    @torch.inference_mode()
    def _run_piece(self, work: Work, reader: Reader, tokens: np.ndarray) -> None:
        ids = torch.from_numpy(tokens)[None].to(self._model.device)
        output = self._model.model(ids, past_key_values=reader.state, use_cache=True)
        if work.request.watch is not None:
            work.request.watch.piece(tokens, output.last_hidden_state[0], self._model.lm_head)
        reader.fed(tokens, output.past_key_values)
        self._counters.read_tokens += len(tokens)
        assert reader.state is not None
        work.emit(Progress(reader.position, reader.arrived, reader.cached, reader.state.nbytes))

    @torch.inference_mode()
    def _watch_last(self, watch: Watch, reader: Reader, token: int) -> None:
        if watch.needs_last:
            ids = torch.tensor([[token]], device=self._model.device)
            output = self._model.model(ids, past_key_values=reader.state, use_cache=True)
            watch.piece(np.array([token]), output.last_hidden_state[0], self._model.lm_head)
        watch.last(token)

    def _finish(self, work: Work, reader: Reader) -> None:
        """Everything is read of a text after which nothing is generated."""
        snapshot = reader.snapshot()
        if snapshot.tokens == 0 or work.request.generation is not None:
            raise RefusedError(Failure.empty, "the text is empty: give at least one character")
        work.emit(Progress(snapshot.tokens, snapshot.tokens, reader.cached, snapshot.nbytes))
        work.finish(snapshot.tokens, snapshot if work.request.keep else None)
