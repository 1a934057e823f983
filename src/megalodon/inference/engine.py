"""The batching engine: many requests, one model, one step after another.

A step decodes one token of every sequence that is generating and reads at most one piece's worth of text, taken from
the requests that are reading, in turn. So whoever generates waits, for each token, at most for one decoding step and
one piece, however long the texts being read are. Requests join and leave between steps.

What a request gives depends on its text, parameters and seed alone, to the bit, whatever else is in the batch: texts
are read in pieces of their own (`reading`), rows of a decoding step do not depend on one another (`slots`), and every
continuation draws from a random generator of its own. This holds in float32 and in bfloat16.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import torch

from megalodon.data.tokenizer import Tokenizer
from megalodon.inference.prefix_cache import PrefixStore
from megalodon.inference.request import (
    Failure,
    QueueFullError,
    Request,
    StoppingError,
)
from megalodon.inference.snapshot_file import ModelIdentity
from megalodon.inference.steps import PIECE, Steps
from megalodon.inference.work import Work
from megalodon.models import CausalLM

_log = logging.getLogger(__name__)


class Engine(Steps):
    """Serves requests over one model. `submit` may be called from any thread; events come from the engine's.

    Attributes:
        counters: for metrics.
        identity: what snapshots of this engine belong to.
        slots: sequences that can generate at once. queue_length: requests that may wait.
        block, piece: tokens between two places where a sequence can be taken up, and tokens read at once.
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
    ) -> None:
        """
        Args:
            model: in evaluation mode.
            tokenizer: the model's.
            slots: sequences that can generate at once; rounded up to a number the hardware likes (`slots.BUCKETS`).
            queue_length: requests that may wait; more are refused.
            piece: tokens read at once, rounded down to fit the chunk size.
            prefixes: makes the store of states for texts read before; None keeps none.
            share_prefixes: let all owners use one another's; how long a text takes then tells who else has read it.

        Raises:
            ValueError: for a number out of range.
            RuntimeError: if this machine's matrix products depend on the batch in a way that cannot be avoided.
        """
        if queue_length < 1:
            raise ValueError(f"queue_length is {queue_length}; it must be 1 or more")
        super().__init__(model, tokenizer, slots, piece, prefixes, share_prefixes)
        self.queue_length = queue_length
        self._dirty = self._stopping = self._abandon = False
        self._thread: threading.Thread | None = None

    def submit(self, request: Request) -> None:
        """Take a request in. Its listener gets events until `Done` or `Failed`.

        Raises:
            ValueError: for more choices than there are slots.
            QueueFullError: if as many wait as may.
            StoppingError: if the engine is being closed.
        """
        if request.generation is not None and request.generation.choices > self.slots:
            raise ValueError(f"choices is {request.generation.choices}; this engine has {self.slots} slots")
        deadline = float("inf") if request.seconds is None else time.monotonic() + request.seconds
        request.feed.on_change(self._wake)
        with self._changed:
            if self._stopping:
                raise StoppingError("the engine is being closed and takes no more requests")
            if len(self._inbox) + len(self._waiting) >= self.queue_length:
                raise QueueFullError(f"{self.queue_length} requests are waiting already")
            self._inbox.append(Work(request, deadline))
            self._dirty = True
            self._changed.notify_all()

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._inbox) + len(self._waiting)

    @property
    def idle(self) -> bool:
        """Nothing is waiting or being worked on."""
        with self._changed:
            return not (self._stepping or self._inbox or len(self._waiting) or self._reading or self._rows)

    @property
    def alive(self) -> bool:
        """The engine's thread is running."""
        return self._thread is not None and self._thread.is_alive()

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
                for work in self._all():
                    self._fail(work, Failure.internal, "a step of the engine failed")
                progressed = False
            if not progressed:
                with self._changed:  # a timeout at most a second late, should nothing happen meanwhile
                    self._changed.wait_for(lambda: self._dirty or self._abandon, 0.05 if not self.idle else 1.0)
        for work in self._all():
            self._fail(work, Failure.stopping, "the server is stopping")
