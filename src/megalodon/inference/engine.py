"""The batching engine: many requests, one model, one step after another.

A step decodes one token of every sequence that is generating and reads at most one piece's worth of text, taken from
the requests that are reading, in turn. So whoever generates waits, for each token, at most for one decoding step and
one piece, however long the texts being read are. Requests join and leave between steps.

The engine is four parts, each in a file of its own: who waits (`schedule`), what is read (`reading`), who decodes
(`decoding`), and, here, the thread that has them take turns.

What a request gives depends on its text, parameters and seed alone, to the bit, whatever else is in the batch: texts
are read in pieces of their own (`reader`), rows of a decoding step do not depend on one another (`slots`), and every
continuation draws from a random generator of its own. This holds in float32 and in bfloat16.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from megalodon.data.tokenizer import Tokenizer
from megalodon.inference.decoding import Decoding
from megalodon.inference.prefix_cache import PrefixStore
from megalodon.inference.reader import block_and_piece, empty_snapshot
from megalodon.inference.reading import Reading
from megalodon.inference.request import Failure, Request, StoppingError
from megalodon.inference.schedule import Schedule
from megalodon.inference.slots import BUCKETS, SlotDecoder, choose_buckets, slot_decoder
from megalodon.inference.snapshot import START, Snapshot
from megalodon.inference.snapshot_file import ModelIdentity
from megalodon.inference.work import Counters, Work
from megalodon.models import CausalLM
from megalodon.models.storage import Storage

PIECE = 512
"""Tokens of a text read at once. More is a little quicker, and makes others wait longer for their next token."""
LOOK_UP_SECONDS = 0.005
"""How long a step that finds nothing to do waits for a look-up before it sees whether there is something else."""
_log = logging.getLogger(__name__)


class Engine:
    """Serves requests over one model. `submit` may be called from any thread; events come from the engine's.

    Attributes:
        model, tokenizer: what it was made with.
        identity: what snapshots of this engine belong to.
        counters: for metrics.
        schedule, reading, decoding: its parts; they belong to its thread.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        slots: int = 32,
        queue_length: int = 256,
        piece: int = PIECE,
        prefixes: Callable[[ModelIdentity], PrefixStore] | None = None,
        share_prefixes: bool = False,
        context_storage: Storage = "exact",
    ) -> None:
        """
        Args:
            model: in evaluation mode.
            tokenizer: the model's.
            slots: sequences that can generate at once; rounded up to a number the hardware likes (`slots.BUCKETS`).
            queue_length: requests that may wait; more are refused.
            piece: tokens read at once, rounded down to fit the chunk size.
            prefixes: makes the store of states for texts read before; None keeps none.
            context_storage: how contexts are written (`megalodon.models.storage`).
            share_prefixes: let all owners use one another's; how long a text takes then tells who else has read it.

        Raises:
            ValueError: for a number out of range.
            RuntimeError: if this machine's matrix products depend on the batch in a way that cannot be avoided.
        """
        self.model, self.tokenizer, self.counters = model, tokenizer, Counters()
        self.schedule, self._make_prefixes = Schedule(queue_length), prefixes
        if model.device.type == "cpu":  # there making them anew is a third of the time of a short prompt
            model.keep_tables()
        decoder = make_decoder(model, slots)  # after what changes the model: it is made anew when it sees a change
        block, piece = block_and_piece(model.model.dimensions.alignment, piece)
        self.identity = ModelIdentity.of(model, tokenizer, block, piece, context_storage)
        store = None if prefixes is None else prefixes(self.identity)
        self.decoding = Decoding(decoder, tokenizer, block, self.counters)
        empty = empty_snapshot(model.model.empty_state(1), START)
        self.reading = Reading(model, self.decoding, empty, piece, self.counters, self._wake, store, share_prefixes)
        self._changed = threading.Condition()
        self._dirty = self._stopping = self._abandon = self._stepping = False
        self._step_began = 0.0
        self._thread: threading.Thread | None = None

    # --- from any thread --------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Take a request in. Its listener gets events until `Done` or `Failed`.

        Raises:
            ValueError: for more choices than there are slots.
            QueueFullError: if as many wait as may.
            StoppingError: if the engine is being closed.
        """
        if request.generation is not None and request.generation.choices > self.slots:
            raise ValueError(f"choices is {request.generation.choices}; this engine has {self.slots} slots")
        work = Work(request, self.counters)
        request.feed.on_change(self._wake)
        with self._changed:
            if self._stopping:
                raise StoppingError("the engine is being closed and takes no more requests")
            self.schedule.add(work)
        self._wake()

    def start(self) -> Engine:
        """Run steps in a thread of the engine's own until `close`."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        return self

    def close(self, seconds: float = 0.0) -> None:
        """Take no more requests, finish the others for up to `seconds`, fail the rest, and end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        end = time.monotonic() + seconds
        while not self.idle and time.monotonic() < end and self._thread is not None:
            time.sleep(0.02)
        with self._changed:
            self._abandon = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        if self.prefixes is not None:
            self.prefixes.close()

    @property
    def slots(self) -> int:
        """Sequences that can generate at once."""
        return self.decoding.slots

    @property
    def decoder(self) -> SlotDecoder:
        """The slots' memory."""
        return self.decoding.decoder

    @property
    def queue_length(self) -> int:
        """Requests that may wait."""
        return self.schedule.most

    @property
    def block(self) -> int:
        """Tokens between two places where a sequence can be taken up."""
        return self.reading.block

    @property
    def piece(self) -> int:
        """Tokens read at once."""
        return self.reading.piece

    @property
    def empty(self) -> Snapshot:
        """Where a text without a context begins."""
        return self.reading.empty

    @property
    def prefixes(self) -> PrefixStore | None:
        """States of texts read before."""
        return self.reading.prefixes

    @prefixes.setter
    def prefixes(self, store: PrefixStore | None) -> None:
        self.reading.prefixes = store

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return len(self.schedule)

    @property
    def idle(self) -> bool:
        """Nothing is waiting or being worked on."""
        with self._changed:
            return not (self._stepping or len(self.schedule) or len(self.reading) or len(self.decoding))

    @property
    def alive(self) -> bool:
        """The engine's thread is running."""
        return self._thread is not None and self._thread.is_alive()

    # --- in the engine's thread -------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Let requests go and let others in, read a piece, decode a token for everybody; False if nothing was done."""
        with self._one_step():
            self._let_go()
            self._let_in()
            read = self.reading.step()
            decoded = self.decoding.step()
            self._count(read or decoded)
        return read or decoded or self.reading.await_look_up(LOOK_UP_SECONDS)

    @contextmanager
    def _one_step(self) -> Iterator[None]:
        self._stepping = True  # a request that is being worked on may be in no part for a moment
        self._step_began = time.perf_counter()
        try:
            yield
        finally:
            self._stepping = False

    def _let_go(self) -> None:
        now = time.monotonic()
        for work in self._works():
            work.fail_if_over(now)
        for part in (self.schedule, self.reading, self.decoding):
            part.forget_ended()

    def _let_in(self) -> None:
        looked = False
        while (
            work := self.schedule.next(self.decoding.free - self.reading.reserved, self.reading.has_room)
        ) is not None:
            if not looked and not self.decoder.is_current():
                self._take_weights()
            looked = True
            self.reading.add(work)

    def _take_weights(self) -> None:
        """The model's weights have changed: begin anew with them. What is under way would be neither of the two."""
        for work in [*self.reading.works(), *self.decoding.works()]:
            work.fail(Failure.internal, "the model's weights were changed meanwhile: send the request again")
        for part in (self.reading, self.decoding):
            part.forget_ended()
        self.decoding.decoder = make_decoder(self.model, self.slots)
        self.identity = ModelIdentity.of(self.model, self.tokenizer, self.block, self.piece, self.identity.storage)
        self.reading.empty = empty_snapshot(self.model.model.empty_state(1), START)
        if self.prefixes is not None and self._make_prefixes is not None:
            self.prefixes.close()
            self.prefixes = self._make_prefixes(self.identity)

    def _count(self, progressed: bool) -> None:
        counters = self.counters
        counters.waiting, counters.reading = len(self.schedule), len(self.reading)
        counters.generating = len(self.decoding)
        if progressed:
            counters.steps += 1
            counters.step_seconds += time.perf_counter() - self._step_began

    def _works(self) -> list[Work]:
        """Everybody, each once: one whose tokens are decoded again is read and in a slot."""
        return list(dict.fromkeys([*self.schedule.works(), *self.reading.works(), *self.decoding.works()]))

    def _wake(self) -> None:
        with self._changed:
            self._dirty = True
            self._changed.notify_all()

    def _run(self) -> None:
        torch.set_num_threads(torch.get_num_threads())  # from here on MKL always uses so many: their number shapes bits
        while not self._abandon:
            with self._changed:
                self._dirty = False
            try:
                progressed = self.step()
            except Exception:  # a defect in what all requests share: they fail, the engine goes on
                _log.exception("a step failed")
                self._fail_all(Failure.internal, "a step of the engine failed")
                progressed = False
            if not progressed:
                with self._changed:  # a timeout at most a second late, should nothing happen meanwhile
                    self._changed.wait_for(lambda: self._dirty or self._abandon, 0.05 if not self.idle else 1.0)
        self._fail_all(Failure.stopping, "the server is stopping")

    def _fail_all(self, failure: Failure, message: str) -> None:
        for work in self._works():
            work.fail(failure, message)
        for part in (self.schedule, self.reading, self.decoding):
            part.forget_ended()


def make_decoder(model: CausalLM, slots: int) -> SlotDecoder:
    """Slots for so many sequences, in sizes of a step that give a row the same bits."""
    largest = [size for size in BUCKETS if size >= slots][:1] or [max(BUCKETS)]
    return slot_decoder(model, slots, choose_buckets(model, [size for size in BUCKETS if size <= largest[0]]))
