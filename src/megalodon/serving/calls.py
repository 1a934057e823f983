"""From HTTP to the engine and back: a request's events as an asynchronous stream that ends the request when it ends."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, contextmanager

from starlette.requests import Request as HttpRequest

from megalodon.inference.engine import Engine
from megalodon.inference.feed import TokenFeed
from megalodon.inference.hidden import Watch
from megalodon.inference.request import Delta, Done, Event, Failed, Generation, Request
from megalodon.inference.snapshot import Snapshot
from megalodon.serving.errors import ApiError, from_failure
from megalodon.serving.metrics import Metrics
from megalodon.serving.settings import Settings

UPLOADS = 64
"""Bodies that are tokenized at a time; each has a thread, which mostly waits for its client."""


class Service:
    """What all endpoints share: the engine, the limits, the metrics, and how many requests each owner has running."""

    def __init__(self, engine: Engine, settings: Settings, metrics: Metrics) -> None:
        self.engine, self.settings, self.metrics = engine, settings, metrics
        self._running: Counter[str] = Counter()
        self._uploading: Counter[str] = Counter()

    def admitted(self, owner: str) -> AbstractContextManager[None]:
        """Count the owner's request while it lasts.

        Raises:
            ApiError: 429 if the owner has as many running as one may.
        """
        return self._counted(self._running, owner, self.settings.max_concurrent, "requests running", "concurrency")

    @contextmanager
    def uploading(self, owner: str) -> Iterator[None]:
        """Count the owner's upload while it lasts: each has a thread, and no owner may take all of them.

        Raises:
            ApiError: 429 if the owner has as many running as one may, 503 if all owners together have `UPLOADS`.
        """
        with self._counted(self._uploading, owner, self.settings.max_uploads, "uploads running", "uploads"):
            if self._uploading.total() > UPLOADS:
                self.metrics.refused.labels("uploads").inc()
                raise ApiError(503, f"the server is reading {UPLOADS} uploads already", "overloaded", retry_after=2)
            yield

    @contextmanager
    def _counted(self, counts: Counter[str], owner: str, most: int, what: str, limit: str) -> Iterator[None]:
        if counts[owner] >= most:
            self.metrics.refused.labels(limit).inc()
            message = f"this key has {most} {what}, the most that one may have"
            raise ApiError(429, message, "too_many_requests", retry_after=1)
        counts[owner] += 1
        try:
            yield
        finally:
            counts[owner] -= 1
            if not counts[owner]:
                del counts[owner]

    def call(
        self,
        owner: str,
        feed: TokenFeed,
        generation: Generation | None,
        start: Snapshot | None = None,
        keep: bool = False,
        seconds: float | None = None,
        watch: Watch | None = None,
    ) -> Call:
        """Give the engine a request; see `Call`. Must be called in the event loop."""
        call = Call(self.metrics)
        limit = self.settings.max_prompt_tokens
        request = Request(owner, start, feed, generation, call.listen, keep, limit, seconds, watch)
        call.request = request
        self.engine.submit(request)
        return call


class Call:
    """One request to the engine, seen from the event loop. Leaving its `with` block ends it."""

    request: Request

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()  # bounded by max_tokens: slow readers hold up nobody
        self._started = time.perf_counter()
        self._last: dict[int, float] = {}

    def listen(self, event: Event) -> None:
        """The engine's listener."""
        if isinstance(event, Delta):
            self._measure(event)
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def _measure(self, delta: Delta) -> None:
        now = time.perf_counter()
        last = self._last.get(delta.choice)
        if last is None:
            self._metrics.first_token.observe(now - self._started)
        elif delta.tokens:
            self._metrics.per_token.observe((now - last) / len(delta.tokens))
        self._last[delta.choice] = now

    def __enter__(self) -> Call:
        return self

    def __exit__(self, *_: object) -> None:
        self.request.cancel()

    async def events(self) -> AsyncIterator[Event]:
        """All events, `Done` the last.

        Raises:
            ApiError: if the request fails.
        """
        while True:
            event = await self._events.get()
            if isinstance(event, Failed):
                raise from_failure(event)
            yield event
            if isinstance(event, Done):
                self._metrics.prompt_tokens.inc(event.usage.prompt_tokens)
                self._metrics.cached_tokens.inc(event.usage.cached_tokens)
                self._metrics.completion_tokens.inc(event.usage.completion_tokens)
                return


async def disconnected(request: HttpRequest) -> None:
    """Return when the client has gone. The request's body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
