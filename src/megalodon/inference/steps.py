"""What one step of the engine does: let requests in and out, read a piece, decode a token for everybody.

Everything here runs in the engine's thread. `engine` is what other threads see.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from megalodon.data.tokenizer import Tokenizer
from megalodon.inference.continuation import Continuation, choose_tokens
from megalodon.inference.prefix_cache import PrefixStore
from megalodon.inference.reading import (
    Finished,
    Piece,
    Reader,
    Ready,
    Replay,
    Waiting,
    block_and_piece,
    compact,
    empty_snapshot,
)
from megalodon.inference.request import Done, Ended, Failure, Progress, Usage
from megalodon.inference.sampling import REPETITION_WINDOW
from megalodon.inference.schedule import Schedule
from megalodon.inference.slots import BUCKETS, SlotDecoder, choose_buckets
from megalodon.inference.snapshot import START, Kind
from megalodon.inference.snapshot_file import ModelIdentity
from megalodon.inference.work import RefusedError, Work
from megalodon.model import MegalodonForCausalLM
from megalodon.ops import KeptTables

PIECE = 512
"""Tokens of a text read at once. More is a little quicker, and makes others wait longer for their next token."""
LEAST_COST = 32
"""A piece of fewer tokens takes about as long as one of so many."""
_log = logging.getLogger(__name__)


class Steps(Schedule):
    """The engine's work; see `engine.Engine`, which adds how requests arrive.

    Attributes:
        identity: what snapshots belong to.
        decoder: the slots.
    """

    def __init__(
        self,
        model: MegalodonForCausalLM,
        tokenizer: Tokenizer,
        slots: int,
        piece: int,
        prefixes: Callable[[ModelIdentity], PrefixStore] | None,
        share_prefixes: bool,
    ) -> None:
        """Arguments as those of `Engine`."""
        self.model, self.tokenizer = model, tokenizer
        largest = [size for size in BUCKETS if size >= slots][:1] or [max(BUCKETS)]
        buckets = choose_buckets(model, [size for size in BUCKETS if size <= largest[0]])
        self._prepare: Callable[[], None] = partial(self._take_weights, slots, buckets, prefixes)
        if model.device.type == "cpu":  # where a short prompt takes a third of its time to make them anew
            for layer in model.model.layers:
                layer.cema.kept = layer.cema.kept or KeptTables()
        self.decoder = SlotDecoder(model, slots, buckets)
        block, piece = block_and_piece(self.decoder.sizes, piece)
        self.identity = ModelIdentity.of(model, tokenizer, block, piece)
        with torch.inference_mode():
            output = model.model(torch.zeros(1, 0, dtype=torch.int64, device=model.device), use_cache=True)
        empty = empty_snapshot(output.past_key_values, START)
        store = None if prefixes is None else prefixes(self.identity)
        super().__init__(self.decoder.slots, empty, block, piece, store, share_prefixes)
        self._stepping = False

    def step(self) -> bool:
        """One step. Returns False if there was nothing to do."""
        started = time.perf_counter()
        self._stepping = True  # a request that is being worked on may be in no queue for a moment
        try:
            return self._step(started)
        finally:
            self._stepping = False

    def _step(self, started: float) -> bool:
        new = bool(self._inbox)
        self._take_in()
        if new and not self.decoder.is_current():
            self._prepare()
        self._drop()
        self._admit()
        read = self._read()
        decoded = self._decode()
        counters = self.counters
        counters.waiting, counters.reading = len(self._waiting), len(self._reading)
        counters.generating = len(self._rows)
        if read or decoded:
            counters.steps += 1
            counters.step_seconds += time.perf_counter() - started
        return read or decoded

    def _take_weights(
        self, slots: int, buckets: Sequence[int], prefixes: Callable[[ModelIdentity], PrefixStore] | None
    ) -> None:
        """The model's weights have changed: begin anew with them. What is under way would be neither of the two."""
        for work in {id(work): work for work in [*self._reading, *self._rows.values()]}.values():
            self._fail(work, Failure.internal, "the model's weights were changed meanwhile: send the request again")
        for work in self._waiting:
            work.reader = None  # it may know states of the old weights
        self.decoder = SlotDecoder(self.model, slots, buckets)
        self.identity = ModelIdentity.of(self.model, self.tokenizer, self.block, self.piece)
        if self.prefixes is not None and prefixes is not None:
            self.prefixes.close()
            self.prefixes = prefixes(self.identity)

    # --- reading ----------------------------------------------------------------------------------------------------

    def _read(self) -> bool:
        """Read up to one piece's worth of tokens, from the requests in turn."""
        budget, progressed, passed = self.piece, False, 0
        while self._reading and budget > 0 and passed < len(self._reading):
            work = self._reading.popleft()
            if work.replay_slot is not None:
                self._reading.append(work)
                passed += 1
                continue
            cost = self._guarded(work, partial(self._read_some, work, budget)) or 0
            if cost < 0:  # more than what is left of the budget: first in the next step
                self._reading.appendleft(work)
                return True
            passed = 0 if cost else passed + 1
            progressed = progressed or cost > 0
            budget -= cost
        return progressed

    def _read_some(self, work: Work, budget: int) -> int:
        """Do the next thing for a reading request and put it back if it goes on reading; its cost in tokens."""
        reader = work.reader
        assert reader is not None
        before = reader.cached
        upcoming = reader.next(budget)
        if upcoming is None:
            return -1
        self._check_length(work)
        if reader.cached > before:
            self.counters.cached_tokens += reader.cached - before
        match upcoming:
            case Piece(tokens):
                self._run_piece(work, reader, tokens)
                self._reading.append(work)
                return max(len(tokens), LEAST_COST)
            case Replay(tokens):
                self._replay(work, reader, tokens)
                self._reading.append(work)
                return 1
            case Ready(kind, token):
                self._generate(work, reader, kind, token)
                return 1
            case Finished():
                self._finish_reading(work, reader)
                return 1
            case Waiting():
                self._reading.append(work)
        return 0

    def _check_length(self, work: Work) -> None:
        reader, most = work.reader, work.request.max_prompt_tokens
        assert reader is not None
        known = 0 if work.request.start is None else work.request.start.tokens
        if most is not None and reader.arrived - known > most:
            raise RefusedError(Failure.too_long, f"the text has more than {most} tokens")

    @torch.inference_mode()
    def _run_piece(self, work: Work, reader: Reader, tokens: np.ndarray) -> None:
        ids = torch.from_numpy(tokens)[None].to(self.model.device)
        output = self.model.model(ids, past_key_values=reader.state, use_cache=True)
        reader.fed(tokens, output.past_key_values)
        self.counters.read_tokens += len(tokens)
        assert reader.state is not None
        self._emit(work, Progress(reader.position, reader.arrived, reader.cached, reader.state.nbytes))

    def _replay(self, work: Work, reader: Reader, tokens: tuple[tuple[Kind, int], ...]) -> None:
        assert reader.state is not None
        slot = self._free_slot()
        self.decoder.load(slot, reader.state)
        reader.state = None
        work.replay.extend(tokens)
        work.replay_slot = slot
        work.reserved -= 1
        self._rows[slot] = work

    def _finish_reading(self, work: Work, reader: Reader) -> None:
        snapshot = reader.snapshot()
        if snapshot.tokens == 0 or work.request.generation is not None:
            raise RefusedError(Failure.empty, "the text is empty: give at least one character")
        usage = Usage(snapshot.tokens, work.not_read_again, 0)
        work.request.feed.abandon()
        self._emit(work, Progress(snapshot.tokens, snapshot.tokens, reader.cached, snapshot.nbytes))
        self._emit(work, Done(usage, snapshot if work.request.keep else None))

    # --- generating -------------------------------------------------------------------------------------------------

    def _free_slot(self) -> int:
        return next(slot for slot in range(self.slots) if slot not in self._rows)

    def _generate(self, work: Work, reader: Reader, kind: Kind, token: int) -> None:
        """Everything is read: put the sequence into its slots."""
        generation, request = work.request.generation, work.request
        assert generation is not None and reader.state is not None
        work.prompt_tokens = reader.position + 1
        history = reader.history
        recent = [*history.recent(), token][-REPETITION_WINDOW:]
        generator = None if request.start is None else request.start.generator
        for index in range(generation.choices):
            slot = self._free_slot()
            self.decoder.load(slot, reader.state)
            own = history.copy() if request.keep else None
            work.continuations[slot] = Continuation(
                index, generation, self.tokenizer, recent, (kind, token), own, generator
            )
            self._rows[slot] = work
        self._emit(work, Progress(work.prompt_tokens, work.prompt_tokens, reader.cached, reader.state.nbytes))
        work.reserved = 0
        reader.state = None

    def _decode(self) -> bool:
        if not self._rows:
            return False
        self._close_up()
        active = sorted(self._rows)
        fed = [self._next_token(slot) for slot in active]
        try:
            logits = self.decoder.step([token for _, token in fed], active)
        except Exception as error:  # nobody's sequence can be trusted any more
            _log.exception("a decoding step failed")
            for work in {id(work): work for work in self._rows.values()}.values():
                self._fail(work, Failure.internal, f"the decoding step failed: {error}")
            return True
        logits = logits.cpu()
        with torch.inference_mode():
            logits[:, self.tokenizer.vocab_size :] = -torch.inf
        choosing = {slot: row for row, slot in enumerate(active) if self._rows[slot].replay_slot != slot}
        continuations = [self._rows[slot].continuations[slot] for slot in choosing]
        chosen = dict(zip(choosing, choose_tokens(continuations, logits[list(choosing.values())]), strict=True))
        for row, (slot, (kind, token)) in enumerate(zip(active, fed, strict=True)):
            if (going := self._rows.get(slot)) is not None:
                after = partial(self._after_step, going, slot, kind, token, chosen.get(slot), logits[row])
                self._guarded(going, after)
        return True

    def _next_token(self, slot: int) -> tuple[Kind, int]:
        work = self._rows[slot]
        return work.replay[0] if work.replay_slot == slot else work.continuations[slot].pending

    def _after_step(
        self, work: Work, slot: int, kind: Kind, token: int, chosen: int | Exception | None, logits: torch.Tensor
    ) -> None:
        """`token` has been fed and gave logits [V]; `chosen` is what follows it, None where tokens are replayed."""
        if chosen is None:
            self._after_replay(work, slot, kind, token)
            return
        if isinstance(chosen, Exception):
            raise chosen
        continuation = work.continuations[slot]
        if continuation.history is not None:
            continuation.history.append(kind, [token])
            if self.decoder.positions[slot] % self.block == 0:
                continuation.history.rebase(compact(self.decoder.read(slot)), read_only=False)
        delta, reason = continuation.take(chosen, logits)
        work.generated += 1
        self.counters.generated_tokens += 1
        if delta is not None:
            self._emit(work, delta)
        if reason is None:
            return
        snapshot = None
        if continuation.history is not None:
            continuation.history.append(*(continuation.pending[0], [continuation.pending[1]]))
            snapshot = continuation.history.snapshot(continuation.generator_state)
        del work.continuations[slot], self._rows[slot]
        self._emit(work, Ended(continuation.index, reason, snapshot))
        if not work.continuations:
            self._emit(work, Done(Usage(work.prompt_tokens, work.not_read_again, work.generated), None))

    def _after_replay(self, work: Work, slot: int, kind: Kind, token: int) -> None:
        reader = work.reader
        assert reader is not None
        work.replay.popleft()
        reader.replayed(kind, token)
        if reader.position % self.block == 0:
            reader.history.rebase(compact(self.decoder.read(slot)), read_only=False)
        if not work.replay:
            reader.state = self.decoder.read(slot)
            work.replay_slot = None
            work.reserved += 1
            del self._rows[slot]

    def _close_up(self) -> None:
        """Move sequences from high slots to free low ones where that makes the step smaller."""
        needed = self.decoder.bucket(len(self._rows))
        for slot in sorted(self._rows, reverse=True):
            if slot < needed:
                return
            target, work = self._free_slot(), self._rows.pop(slot)
            self.decoder.move(slot, target)
            self._rows[target] = work
            if work.replay_slot == slot:
                work.replay_slot = target
            else:
                work.continuations[target] = work.continuations.pop(slot)
