"""A request in the engine: what of it has been done, how it ends, and what the engine counts.

Every part of the engine that holds a request may end it. `ended` then tells the other parts to let go of it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from megalodon.inference.guidance import FormError
from megalodon.inference.reader import Reader
from megalodon.inference.request import Done, Event, Failed, Failure, Request, Usage
from megalodon.inference.snapshot import Snapshot

_log = logging.getLogger(__name__)
Result = TypeVar("Result")


@dataclass
class Counters:
    """What the engine has done, for metrics. Written by its thread alone."""

    steps: int = 0
    read_tokens: int = 0
    generated_tokens: int = 0
    cached_tokens: int = 0
    waiting: int = 0
    reading: int = 0
    generating: int = 0
    failures: int = 0
    step_seconds: float = 0.0


class RefusedError(Exception):
    """A request that cannot be done, and why."""

    def __init__(self, failure: Failure, message: str) -> None:
        super().__init__(message)
        self.failure = failure


class Work:
    """A request in the engine.

    Attributes:
        reader: of its text, from when reading begins.
        reserved: slots that it may still take.
        prompt_tokens: length of the sequence before the first generated token, known when all is read.
        running: continuations that go on. generated: tokens of all of them.
        ended: it is complete or has failed; nobody hears of it again.
    """

    def __init__(self, request: Request, counters: Counters) -> None:
        self.request, self._counters = request, counters
        self._deadline = float("inf") if request.seconds is None else time.monotonic() + request.seconds
        self.reader: Reader | None = None
        self.reserved = self.prompt_tokens = self.running = self.generated = 0
        self.ended = False

    @property
    def slots_needed(self) -> int:
        """Slots that it needs at once: one for each choice, or one to decode again what was generated before."""
        if self.request.generation is not None:
            return self.request.generation.choices
        start = self.request.start
        return int(start is not None and any(segment.kind == "generated" for segment in start.tail))

    @property
    def not_read_again(self) -> int:
        """Tokens of the sequence whose state was there already: in the snapshot it began with, or in the cache."""
        cached = 0 if self.reader is None else self.reader.cached
        return cached + (0 if self.request.start is None else self.request.start.position)

    def emit(self, event: Event) -> None:
        """Tell the listener."""
        try:
            self.request.listener(event)
        except Exception:  # a listener's defect must not stop the others
            _log.exception("a listener failed")
            self.request.cancelled.set()

    def finish(self, prompt_tokens: int, snapshot: Snapshot | None = None) -> None:
        """It is complete."""
        self._end()
        self.emit(Done(Usage(prompt_tokens, self.not_read_again, self.generated), snapshot))

    def fail(self, failure: Failure, message: str, field: str | None = None) -> None:
        """It ends without completing."""
        self._end()
        if failure is not Failure.cancelled:
            self._counters.failures += 1
        self.emit(Failed(failure, message, field))

    def fail_if_over(self, now: float) -> None:
        """Fail if it was cancelled or its time is over; `now` is of `time.monotonic`."""
        if self.request.cancelled.is_set():
            self.fail(Failure.cancelled, "the request was cancelled")
        elif now > self._deadline:
            self.fail(Failure.timeout, f"not complete after {self.request.seconds:g} seconds")

    def guarded(self, do: Callable[[], Result]) -> Result | None:
        """What `do` gives; None if it fails, and the request with it: what goes wrong in one harms no other."""
        try:
            return do()
        except RefusedError as refused:
            self.fail(refused.failure, str(refused))
        except FormError as error:
            self.fail(Failure.form, str(error), error.field)
        except Exception as error:
            _log.exception("a request failed")
            self.fail(Failure.internal, str(error))
        return None

    def _end(self) -> None:
        self.ended, self.reserved = True, 0
        self.request.feed.abandon()
