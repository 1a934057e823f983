"""One completion request through the engine: several prompts and choices, whole or as a stream, its context kept."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from anyio import to_thread
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from megalodon.inference.context_store import ContextRecord, ContextStore
from megalodon.inference.feed import TokenFeed
from megalodon.inference.request import Delta, Done, Ended, Event, Generation, Progress, TokenChoice, Usage
from megalodon.inference.snapshot import Snapshot
from megalodon.serving.calls import Call, Service, disconnected
from megalodon.serving.errors import ApiError, from_exception
from megalodon.serving.responses import HoldingResponse
from megalodon.serving.schemas import SaveContext, StreamOptions

NOTE_SECONDS = 1.0
"""While a prompt is read, a stream carries a comment this often, so that nothing on the way takes it for dead."""


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
        prompts: token ids of each.
        start: the context to go on from, with its record. save: how to keep what comes of it, or None.
    """

    owner: str
    prompts: list[np.ndarray]
    generation: Generation
    format: Format
    start: tuple[ContextRecord, Snapshot] | None
    save: SaveContext | None
    stream: bool
    options: StreamOptions


@dataclass
class _Outcome:
    """What has come of a job so far."""

    texts: dict[int, list[str]] = field(default_factory=dict)
    tokens: dict[int, list[TokenChoice]] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    usages: list[Usage] = field(default_factory=list)
    snapshot: Snapshot | None = None

    def note(self, event: Event, index: int) -> None:
        match event:
            case Delta(_, text, tokens):
                self.texts.setdefault(index, []).append(text)
                self.tokens.setdefault(index, []).extend(tokens)
            case Ended(_, reason, snapshot):
                self.reasons[index] = reason.value
                self.snapshot = snapshot
            case Done(usage, _):
                self.usages.append(usage)

    def usage(self) -> dict[str, Any]:
        prompt = sum(usage.prompt_tokens for usage in self.usages)
        completion = sum(usage.completion_tokens for usage in self.usages)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in self.usages)},
        }


async def respond(service: Service, store: ContextStore, http: HttpRequest, job: Job) -> Response:
    """Run a job and answer it.

    Raises:
        ApiError: whatever is refused or fails before the first part of the answer.
    """
    stack = ExitStack()
    try:
        stack.enter_context(service.admitted(job.owner))
        calls = [stack.enter_context(_begin(service, job, prompt)) for prompt in job.prompts]
        if job.stream:
            events = _merged(calls, job.generation.choices)
            first = await _unless_disconnected(http, _first(events))  # what is refused at once has its own status
            body = _stream(store, job, first, events)
            return HoldingResponse(body, "text/event-stream", {"Cache-Control": "no-cache"}, stack.pop_all())
        outcome = await _unless_disconnected(http, _gather(calls, job.generation.choices))
        return JSONResponse(await _whole(store, job, outcome))
    finally:
        stack.close()


def _begin(service: Service, job: Job, prompt: np.ndarray) -> Call:
    start = None if job.start is None else job.start[1]
    keep, seconds = job.save is not None, service.settings.request_seconds
    return service.call(job.owner, TokenFeed(prompt), job.generation, start, keep, seconds)


async def _merged(calls: Sequence[Call], choices: int) -> AsyncIterator[tuple[int, Event]]:
    """(index of the choice in the answer, event) of all calls as they come."""
    queue: asyncio.Queue[tuple[int, Event] | BaseException | None] = asyncio.Queue()

    async def pump(number: int, call: Call) -> None:
        try:
            async for event in call.events():
                index = number * choices + (event.choice if isinstance(event, Delta | Ended) else 0)
                queue.put_nowait((index, event))
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(number, call)) for number, call in enumerate(calls)]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()


async def _first(events: AsyncIterator[tuple[int, Event]]) -> tuple[int, Event]:
    return await anext(events)


async def _gather(calls: Sequence[Call], choices: int) -> _Outcome:
    outcome = _Outcome()
    async for index, event in _merged(calls, choices):
        outcome.note(event, index)
    return outcome


async def _unless_disconnected(http: HttpRequest, work: Any) -> Any:
    """What the work gives; if the client goes first, the work is ended."""
    task, gone = asyncio.create_task(work), asyncio.create_task(disconnected(http))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client has gone", "cancelled")
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()


async def _whole(store: ContextStore, job: Job, outcome: _Outcome) -> dict[str, Any]:
    choices = [
        job.format.choice(index, "".join(outcome.texts.get(index, [])), outcome.tokens.get(index, []), reason)
        for index, reason in sorted(outcome.reasons.items())
    ]
    answer = {**job.format.envelope(stream=False), "choices": choices, "usage": outcome.usage()}
    return answer | await _kept(store, job, outcome)


async def _stream(
    store: ContextStore, job: Job, first: tuple[int, Event], rest: AsyncIterator[tuple[int, Event]]
) -> AsyncIterator[bytes]:
    outcome, noted = _Outcome(), time.monotonic()
    envelope = job.format.envelope(stream=True)
    usage = {"usage": None} if job.options.include_usage else {}

    def chunk(choices: list[dict[str, Any]], **more: Any) -> bytes:
        return f"data: {json.dumps({**envelope, 'choices': choices, **usage, **more})}\n\n".encode()

    try:
        for choice in job.format.first_chunks(len(job.prompts) * job.generation.choices):
            yield chunk([choice])
        async for index, event in _chained(first, rest):
            outcome.note(event, index)
            match event:
                case Delta(_, text, tokens):
                    yield chunk([job.format.chunk(index, text, tokens, None)])
                case Ended(_, reason, _):
                    yield chunk([job.format.chunk(index, "", (), reason.value)])
                case Progress(read, arrived, _, _) if time.monotonic() - noted > NOTE_SECONDS:
                    noted = time.monotonic()
                    yield f": {read} of {arrived} tokens read\n\n".encode()
        kept = await _kept(store, job, outcome)
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


async def _chained(
    first: tuple[int, Event], rest: AsyncIterator[tuple[int, Event]]
) -> AsyncIterator[tuple[int, Event]]:
    yield first
    async for item in rest:
        yield item


async def _kept(store: ContextStore, job: Job, outcome: _Outcome) -> dict[str, Any]:
    """The answer's `context` field, after saving it; empty if it was not asked for."""
    if job.save is None:
        return {}
    assert outcome.snapshot is not None
    snapshot, save = outcome.snapshot, job.save
    expires = None if save.expires_in is None else time.time() + save.expires_in
    if save.replace and job.start is not None:
        since = job.start[0]
        record = await to_thread.run_sync(store.extend, job.owner, since.id, snapshot, since)
    else:
        parent = None if job.start is None else job.start[0].id
        record = await to_thread.run_sync(store.create, job.owner, snapshot, save.name, expires, parent)
    return {"context": describe(record)}


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
