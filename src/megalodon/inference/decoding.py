"""Who decodes: sequences in slots, one token of each a step.

Who is in a slot generates, or has tokens that were generated once decoded again, so that they take the same way through
the arithmetic (`snapshot`).
"""

from __future__ import annotations

import logging
from collections import deque
from functools import partial
from typing import Protocol, TypeAlias

import torch

from megalodon.data.tokenizer import Tokenizer
from megalodon.inference.continuation import Continuation, choose_tokens
from megalodon.inference.reader import Reader, compact
from megalodon.inference.request import Ended, Failure, Progress
from megalodon.inference.sampling import REPETITION_WINDOW
from megalodon.inference.slots import SlotDecoder
from megalodon.inference.snapshot import Kind
from megalodon.inference.work import Counters, Work

_log = logging.getLogger(__name__)
Fed: TypeAlias = "tuple[Kind, int]"
"""A token, and how it comes into the sequence."""


class Occupant(Protocol):
    """Who is in a slot."""

    work: Work

    @property
    def upcoming(self) -> Fed:
        """What to feed next."""


class Generating:
    """A continuation in its slot."""

    def __init__(self, work: Work, continuation: Continuation) -> None:
        self.work, self.continuation = work, continuation

    @property
    def upcoming(self) -> Fed:
        """The token chosen last."""
        return self.continuation.pending


class Replaying:
    """A text's sequence in a slot for as long as tokens of it are decoded again."""

    def __init__(self, work: Work, reader: Reader, tokens: tuple[Fed, ...]) -> None:
        self.work, self.reader, self.tokens = work, reader, deque(tokens)

    @property
    def upcoming(self) -> Fed:
        """The first token that is left."""
        return self.tokens[0]


class Decoding:
    """The sequences in slots.

    Attributes:
        decoder: the slots' memory, and the model's step on it.
        block: tokens between two places where a sequence can be taken up.
        slots: sequences that can be decoded at once.
    """

    def __init__(self, decoder: SlotDecoder, tokenizer: Tokenizer, block: int, counters: Counters) -> None:
        self.decoder, self.block, self.slots = decoder, block, decoder.slots
        self._tokenizer, self._counters = tokenizer, counters
        self._occupants: dict[int, Occupant] = {}  # by slot

    def __len__(self) -> int:
        return len(self._occupants)

    @property
    def free(self) -> int:
        """Slots that nobody is in."""
        return self.slots - len(self._occupants)

    def works(self) -> list[Work]:
        """All that are in slots, each once."""
        return list(dict.fromkeys(occupant.work for occupant in self._occupants.values()))

    def forget_ended(self) -> None:
        """Free the slots of requests that have ended."""
        for slot in [slot for slot, occupant in self._occupants.items() if occupant.work.ended]:
            del self._occupants[slot]

    # --- in ---------------------------------------------------------------------------------------------------------

    def replay(self, work: Work, reader: Reader, tokens: tuple[Fed, ...]) -> None:
        """Decode tokens without choosing; the reader has its state back when they are done."""
        assert reader.state is not None
        slot = self._free_slot()
        self.decoder.load(slot, reader.state)
        reader.state = None
        work.reserved -= 1
        self._occupants[slot] = Replaying(work, reader, tokens)

    def generate(self, work: Work, reader: Reader, pending: Fed) -> None:
        """Everything is read but the token `pending`: put the sequence into a slot for each continuation."""
        generation, request, state = work.request.generation, work.request, reader.state
        assert generation is not None and state is not None
        work.prompt_tokens = reader.position + 1
        recent = [*reader.history.recent(), pending[1]][-REPETITION_WINDOW:]
        generator = None if request.start is None else request.start.generator
        for index in range(generation.choices):
            slot = self._free_slot()
            self.decoder.load(slot, state)
            own = reader.history.copy() if request.keep else None
            continuation = Continuation(index, generation, self._tokenizer, recent, pending, own, generator)
            self._occupants[slot] = Generating(work, continuation)
            work.running += 1
        work.emit(Progress(work.prompt_tokens, work.prompt_tokens, reader.cached, state.nbytes))
        work.reserved = 0
        reader.state = None

    def _free_slot(self) -> int:
        return next(slot for slot in range(self.slots) if slot not in self._occupants)

    # --- step -------------------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Decode one token of every sequence; False if there is none."""
        if not self._occupants:
            return False
        self._close_up()
        active = sorted(self._occupants)
        fed = [self._occupants[slot].upcoming for slot in active]
        logits = self._logits(fed, active)
        if logits is not None:
            chosen = self._choose(active, logits)
            for row, (slot, token) in enumerate(zip(active, fed, strict=True)):
                occupant = self._occupants[slot]
                if not occupant.work.ended:
                    occupant.work.guarded(partial(self._after, slot, occupant, token, chosen.get(slot), logits[row]))
        self.forget_ended()
        return True

    def _close_up(self) -> None:
        """Move sequences from high slots to free low ones where that makes the step smaller."""
        needed = self.decoder.bucket(len(self._occupants))
        for slot in sorted(self._occupants, reverse=True):
            if slot < needed:
                return
            target = self._free_slot()
            self.decoder.move(slot, target)
            self._occupants[target] = self._occupants.pop(slot)

    def _logits(self, fed: list[Fed], active: list[int]) -> torch.Tensor | None:
        """Logits [len(active), V] after the tokens; None if the step failed, and everybody with it."""
        try:
            logits = self.decoder.step([token for _, token in fed], active)
        except Exception as error:  # nobody's sequence can be trusted any more
            _log.exception("a decoding step failed")
            for work in self.works():
                work.fail(Failure.internal, f"the decoding step failed: {error}")
            return None
        logits = logits.cpu()
        with torch.inference_mode():
            logits[:, self._tokenizer.vocab_size :] = -torch.inf
        return logits

    def _choose(self, active: list[int], logits: torch.Tensor) -> dict[int, int | Exception]:
        """The next token in each slot that generates, or why there is none."""
        found = [(row, slot, self._occupants[slot]) for row, slot in enumerate(active)]
        rows = [(row, slot, one.continuation) for row, slot, one in found if isinstance(one, Generating)]
        chosen = choose_tokens([continuation for *_, continuation in rows], logits[[row for row, *_ in rows]])
        return dict(zip((slot for _, slot, _ in rows), chosen, strict=True))

    def _after(
        self, slot: int, occupant: Occupant, fed: Fed, chosen: int | Exception | None, logits: torch.Tensor
    ) -> None:
        """A token has been fed and gave logits [V]; `chosen` follows it, None where tokens are replayed."""
        if isinstance(chosen, Exception):
            raise chosen
        if isinstance(occupant, Replaying):
            if occupant.work.request.watch is not None:
                occupant.work.request.watch.step(logits)
            self._replayed(slot, occupant, fed)
        elif isinstance(occupant, Generating) and chosen is not None:
            self._generated(slot, occupant, fed, chosen, logits)

    # --- out --------------------------------------------------------------------------------------------------------

    def _replayed(self, slot: int, occupant: Replaying, fed: Fed) -> None:
        occupant.tokens.popleft()
        reader = occupant.reader
        reader.replayed(*fed)
        if reader.position % self.block == 0:
            reader.history.rebase(compact(self.decoder.read(slot)), read_only=False)
        if not occupant.tokens:
            reader.state = self.decoder.read(slot)
            occupant.work.reserved += 1
            del self._occupants[slot]

    def _generated(self, slot: int, occupant: Generating, fed: Fed, chosen: int, logits: torch.Tensor) -> None:
        work, continuation = occupant.work, occupant.continuation
        history = continuation.history
        if history is not None:
            history.append(fed[0], [fed[1]])
            if self.decoder.positions[slot] % self.block == 0:
                history.rebase(compact(self.decoder.read(slot)), read_only=False)
        delta, reason = continuation.take(chosen, logits)
        work.generated += 1
        self._counters.generated_tokens += 1
        if delta is not None:
            work.emit(delta)
        if reason is None:
            return
        snapshot = None
        if history is not None:
            history.append(continuation.pending[0], [continuation.pending[1]])
            snapshot = history.snapshot(continuation.generator_state)
        del self._occupants[slot]
        work.running -= 1
        work.emit(Ended(continuation.index, reason, snapshot))
        if not work.running:
            work.finish(work.prompt_tokens)
