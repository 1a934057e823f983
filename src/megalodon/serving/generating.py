"""One completion request through the engine: several prompts and choices, whole or as a stream, its context kept."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

from anyio import to_thread
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from megalodon.inference.context_store import ContextRecord, ContextStore
from megalodon.inference.hidden import Scores, TokenChoice, Watch
from megalodon.inference.request import Delta, Done, Ended, Event, Generation, Progress, QueueFullError, Usage
from megalodon.inference.snapshot import Snapshot
from megalodon.serving.calls import Call, Service, disconnected
from megalodon.serving.errors import ApiError, from_exception
from megalodon.serving.prompts import feed
from megalodon.serving.responses import HoldingResponse, json_answer
from megalodon.serving.room import Reservation
from megalodon.serving.schemas import SaveContext, StreamOptions
from megalodon.serving.texts import LongText, Prompt

NOTE_SECONDS = 1.0
"""While a prompt is read, a stream carries a comment this often, so that nothing on the way takes it for dead."""
MOST_SCORES = 1 << 18
"""Log-probabilities of prompts that one answer may have, those of the likeliest tokens included."""
SCORES_IN_CHUNK = MANY_SCORES = 1024
RETRY_SECONDS = 0.05
"""Between two tries to have one of many prompts taken by an engine whose queue is full."""


class Format(Protocol):
    """How an endpoint writes its answers."""

    def choice(self, index: int, text: str, tokens: Sequence[TokenChoice], reason: str) -> dict[str, Any]: ...

    def first_chunks(self, choices: int) -> list[dict[str, Any]]: ...

    def chunk(self, index: int, text: str, tokens: Sequence[TokenChoice], reason: str | None) -> dict[str, Any]: ...

    def envelope(self, stream: bool) -> dict[str, Any]: ...


@dataclass
class Job:
    """What is to be done.

    Attributes:
        prompts: text or ids of each.
        generation: how they are continued; None only reads them. choices: answers to each.
        start: the context to go on from, with its record.
        save: how to keep what comes of it, or None; place: where, if that is a new context; keep_seconds: for how long.
        echo: whether an answer begins with its prompt. scores: with log-probabilities of so many tokens; None for none.
        at_once: prompts that the engine is given at a time.
        watch: makes what looks at the hidden states of a prompt. marks: `TokenFeed`'s, of the one prompt.
    """

    owner: str
    prompts: list[Prompt]
    generation: Generation | None
    choices: int = 1
    start: tuple[ContextRecord, Snapshot] | None = None
    save: SaveContext | None = None
    place: Reservation | None = None
    keep_seconds: float | None = None
    stream: bool = False
    options: StreamOptions = field(default_factory=StreamOptions)
    echo: bool = False
    scores: int | None = None
    at_once: int = 1
    watch: Callable[[], Watch] | None = None
    marks: tuple[int, ...] = ()


@dataclass
class Outcome:
    """What has come of a job so far."""

    job: Job
    texts: dict[int, list[str]] = field(default_factory=dict)
    tokens: dict[int, list[TokenChoice]] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    usages: dict[int, Usage] = field(default_factory=dict)
    read: dict[int, Progress] = field(default_factory=dict)
    snapshot: Snapshot | None = None

    def note(self, event: Event, index: int) -> None:
        """`index` is that of the choice in the answer; of the prompt's first one for events of all its choices."""
        match event:
            case Delta(_, text, tokens):
                self.texts.setdefault(index, []).append(text)
                self.tokens.setdefault(index, []).extend(tokens)
            case Ended(_, reason, snapshot):
                self.reasons[index] = reason.value
                self.snapshot = snapshot
            case Progress():
                self.read[index] = event
            case Done(usage, snapshot):
                self.usages[index] = usage
                if self.job.generation is None:
                    self.snapshot = snapshot
                    self.reasons |= {index + choice: "length" for choice in range(self.job.choices)}

    def usage(self) -> dict[str, Any]:
        """Tokens of prompts and answers: of those that are done, and so far of the others."""
        prompt = sum(usage.prompt_tokens for usage in self.usages.values())
        cached = sum(usage.cached_tokens for usage in self.usages.values())
        completion = sum(usage.completion_tokens for usage in self.usages.values())
        going_on = self.read.keys() - self.usages.keys()
        prompt += sum(self.read[index].read for index in going_on)
        cached += sum(self.read[index].cached for index in going_on)
        completion += sum(
            len(self.tokens.get(index + choice, ())) for index in going_on for choice in range(self.job.choices)
        )
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


class Running:
    """A job in the engine. Leaving its `with` block ends what is left of it."""

    def __init__(self, service: Service, job: Job) -> None:
        self.watches: dict[int, Watch] = {}
        self._service, self._job = service, job
        self._queue: asyncio.Queue[tuple[int, Event] | Exception | None] = asyncio.Queue()
        self._room = asyncio.Semaphore(job.at_once)
        self._tasks: list[asyncio.Task[None]] = []
        self._calls: set[Call] = set()
        self._scored: dict[int, int] = {}

    def __enter__(self) -> Running:
        self._tasks = [asyncio.create_task(self._pump(number)) for number in range(len(self._job.prompts))]
        return self

    def __exit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        for call in self._calls:
            call.request.cancel()

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """(index of the choice in the answer, event) of all prompts as they come."""
        running = len(self._tasks)
        while running:
            item = await self._queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item

    async def _pump(self, number: int) -> None:
        try:
            async with self._room:
                await self._answer(number)
            self._queue.put_nowait(None)
        except Exception as error:
            self._queue.put_nowait(error)

    async def _answer(self, number: int) -> None:
        job, filling = self._job, None
        try:
            tokens, filling = await feed(job.prompts[number], self._service.engine.tokenizer, job.marks)
            call = await self._submitted(number, tokens)
            if filling is not None:
                filling.add_done_callback(lambda task: _end_if_failed(task, call))
            with call:
                self._calls.add(call)
                async for event in call.events():
                    if job.scores is not None and isinstance(event, Progress):
                        self._check_scores(number, event)
                    own = event.choice if isinstance(event, Delta | Ended) else 0
                    self._queue.put_nowait((number * job.choices + own, event))
                self._calls.discard(call)
        except ApiError:
            if filling is not None and filling.done() and not filling.cancelled() and (cause := filling.exception()):
                raise cause from None  # the engine only saw a text that was given up
            raise
        finally:
            if filling is not None:
                filling.cancel()

    def _check_scores(self, number: int, progress: Progress) -> None:
        self._scored[number] = progress.read
        if sum(self._scored.values()) * (1 + (self._job.scores or 0)) > MOST_SCORES:
            message = f"echo: more than {MOST_SCORES:,} log-probabilities, the most that are accepted"
            raise ApiError(413, message, "prompt_too_long", "echo")

    async def _submitted(self, number: int, tokens: Any) -> Call:
        job, service = self._job, self._service
        start, seconds = None if job.start is None else job.start[1], service.settings.request_seconds
        end = time.monotonic() + seconds
        watch = self._watch(number, start)
        while True:
            try:
                return service.call(job.owner, tokens, job.generation, start, job.save is not None, seconds, watch)
            except QueueFullError:
                if number == 0 or time.monotonic() > end:
                    raise
            await asyncio.sleep(RETRY_SECONDS)

    def _watch(self, number: int, start: Snapshot | None) -> Watch | None:
        job = self._job
        if job.watch is not None:
            self.watches[number] = job.watch()
        elif job.echo and job.scores is not None:
            skip = 0 if start is None else start.tokens - start.position
            self.watches[number] = Scores(job.scores, self._service.engine.tokenizer.vocab_size, skip)
        return self.watches.get(number)

    def echoed(self, index: int) -> tuple[str, Sequence[TokenChoice]]:
        """The prompt of a choice as its answer begins with it: text and tokens; nothing if it was not asked for."""
        if not self._job.echo:
            return "", ()
        number = index // self._job.choices
        prompt, watch = self._job.prompts[number], self.watches.get(number)
        text = str(prompt) if isinstance(prompt, str | LongText) else self._service.engine.tokenizer.decode(prompt)
        return text, watch.tokens if isinstance(watch, Scores) else ()


def _end_if_failed(task: asyncio.Task[None], call: Call) -> None:
    if task.cancelled() or task.exception() is not None:
        call.request.cancel()


async def respond(service: Service, store: ContextStore, http: HttpRequest, job: Job, format: Format) -> Response:
    """Run a job and answer it.

    Raises:
        ApiError: whatever is refused or fails before the first part of the answer.
    """
    stack = ExitStack()
    try:
        if job.place is not None:
            stack.enter_context(job.place)
        stack.enter_context(service.admitted(job.owner))
        running = stack.enter_context(Running(service, job))
        if job.stream:
            events = running.events()
            first = await unless_disconnected(http, anext(events))  # what is refused at once has its own status
            body = _stream(store, job, format, running, chained(first, events))
            return HoldingResponse(body, "text/event-stream", {"Cache-Control": "no-cache"}, stack.pop_all())
        outcome = await unless_disconnected(http, gather(running, job))
        return await json_answer(await _whole(store, job, format, running, outcome), is_large(outcome))
    finally:
        stack.close()


async def gather(running: Running, job: Job) -> Outcome:
    """What comes of a job, when all has."""
    outcome = Outcome(job)
    async for index, event in running.events():
        outcome.note(event, index)
    return outcome


def is_large(outcome: Outcome) -> bool:
    """Whether an answer takes long to be written: a prompt in it, or log-probabilities of many tokens."""
    job = outcome.job
    listed = 0 if job.generation is None or job.generation.logprobs is None else 1 + job.generation.logprobs
    return job.echo or listed * sum(map(len, outcome.tokens.values())) > MANY_SCORES


async def unless_disconnected(http: HttpRequest, work: Any) -> Any:
    """What the work gives; if the client goes first, the work is ended."""
    task, gone = asyncio.ensure_future(work), asyncio.create_task(disconnected(http))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client has gone", "cancelled")
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()


async def _whole(store: ContextStore, job: Job, format: Format, running: Running, outcome: Outcome) -> dict[str, Any]:
    kept = await keep(store, job, outcome)
    return await to_thread.run_sync(_written, job, format, running, outcome, kept)


def _written(job: Job, format: Format, running: Running, outcome: Outcome, kept: dict[str, Any]) -> dict[str, Any]:
    choices = []
    for index, reason in sorted(outcome.reasons.items()):
        text, tokens = running.echoed(index)
        text += "".join(outcome.texts.get(index, []))
        choices.append(format.choice(index, text, [*tokens, *outcome.tokens.get(index, [])], reason))
    return {**format.envelope(stream=False), "choices": choices, "usage": outcome.usage(), **kept}


async def _stream(
    store: ContextStore, job: Job, format: Format, running: Running, events: AsyncIterator[tuple[int, Event]]
) -> AsyncIterator[bytes]:
    outcome, noted, echoed = Outcome(job), time.monotonic(), set[int]()
    envelope, continuous = format.envelope(stream=True), bool(job.options.continuous_usage_stats)

    def chunk(choices: list[dict[str, Any]], **more: Any) -> bytes:
        usage = {"usage": outcome.usage() if continuous else None} if job.options.include_usage else {}
        return f"data: {json.dumps({**envelope, 'choices': choices, **usage, **more})}\n\n".encode()

    def beginning(first: int) -> list[bytes]:
        """The prompt before the answers to it, if that is wanted and was not given yet."""
        indices = [index for index in range(first, first + job.choices) if job.echo and index not in echoed]
        echoed.update(indices)
        return [part for index in indices for part in one_beginning(index)]

    def one_beginning(index: int) -> Iterator[bytes]:
        text, tokens = running.echoed(index)
        for start in range(0, max(1, len(tokens)), SCORES_IN_CHUNK):
            yield chunk([format.chunk(index, text, tokens[start : start + SCORES_IN_CHUNK], None)])
            text = ""

    try:
        for choice in format.first_chunks(len(job.prompts) * job.choices):
            yield chunk([choice])
        async for index, event in events:
            outcome.note(event, index)
            if isinstance(event, Delta | Ended | Done):
                for part in await to_thread.run_sync(beginning, index // job.choices * job.choices):
                    yield part
            match event:
                case Delta(_, text, tokens):
                    yield chunk([format.chunk(index, text, tokens, None)])
                case Ended(_, reason, _):
                    yield chunk([format.chunk(index, "", (), reason.value)])
                case Done() if job.generation is None:
                    for one in range(index, index + job.choices):
                        yield chunk([format.chunk(one, "", (), "length")])
                case Progress(read, arrived, _, _) if time.monotonic() - noted > NOTE_SECONDS:
                    noted = time.monotonic()
                    yield f": {read} of {arrived} tokens read\n\n".encode()
        kept = await keep(store, job, outcome)
        if job.options.include_usage:
            yield chunk([], **{"usage": outcome.usage(), **kept})
        elif kept:
            yield chunk([], **kept)
    except Exception as error:
        known = from_exception(error)
        if known is None:
            raise
        yield f"data: {json.dumps(known.body())}\n\n".encode()
        return
    yield b"data: [DONE]\n\n"


async def chained(first: tuple[int, Event], rest: AsyncIterator[tuple[int, Event]]) -> AsyncIterator[tuple[int, Event]]:
    """`first`, then the rest."""
    yield first
    async for item in rest:
        yield item


async def keep(store: ContextStore, job: Job, outcome: Outcome) -> dict[str, Any]:
    """The answer's `context` field, after saving it; empty if it was not asked for."""
    if job.save is None:
        return {}
    assert outcome.snapshot is not None
    return {"context": describe(await to_thread.run_sync(_saved, store, job, outcome.snapshot, job.save))}


def _saved(store: ContextStore, job: Job, snapshot: Snapshot, save: SaveContext) -> ContextRecord:
    if save.replace and job.start is not None:
        since = job.start[0]
        return store.extend(job.owner, since.id, snapshot, since)
    expires = None if job.keep_seconds is None else time.time() + job.keep_seconds
    parent = None if job.start is None else job.start[0].id
    assert job.place is not None
    return job.place.fill(lambda: store.create(job.owner, snapshot, save.name, expires, parent))


def describe(record: ContextRecord) -> dict[str, Any]:
    """A context as the API shows it."""
    return {
        "id": record.id,
        "object": "context",
        "name": record.name,
        "created_at": int(record.created),
        "changed_at": int(record.changed),
        "expires_at": None if record.expires is None else int(record.expires),
        "tokens": record.tokens,
        "bytes": record.bytes,
        "model": record.model,
        "tokenizer": record.tokenizer,
        "text": record.text,
        "parent": record.parent,
    }
