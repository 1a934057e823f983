"""`/v1/responses`: OpenAI's newer way to ask for text. What was said before is not sent again: each response is kept as
a context called by its id, and `previous_response_id` goes on from it."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, suppress
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Request
from starlette.responses import Response

from megalodon.data.tokenizer import Tokenizer
from megalodon.inference.context_store import ContextRecord, ContextStore, NoContextError
from megalodon.inference.hidden import TokenChoice
from megalodon.inference.request import Delta, Ended, Event
from megalodon.serving import bodies
from megalodon.serving.asking import Asked, Asking, made_by, schema_or_object, stops_of
from megalodon.serving.chat import ChatTemplate, Template
from megalodon.serving.errors import ERRORS, ApiError, from_exception
from megalodon.serving.formats import logprobs_of
from megalodon.serving.generating import Job, Outcome, Running, chained, gather, is_large, unless_disconnected
from megalodon.serving.response_schemas import (
    InputCall,
    InputCallOutput,
    InputReasoning,
    InputReference,
    ResponsesRequest,
)
from megalodon.serving.responses import HoldingResponse, json_answer, json_steps
from megalodon.serving.schemas import Message, SaveContext
from megalodon.serving.texts import LongText

LOGPROBS = "message.output_text.logprobs"


def router(asking: Asking, template: ChatTemplate) -> APIRouter:
    """The endpoints."""
    routes = APIRouter(prefix="/v1/responses", responses=ERRORS)
    service, store = asking.service, asking.store

    @routes.post("", response_model=None, openapi_extra=bodies.described(ResponsesRequest))
    async def create(http: Request) -> Response:
        """Answer a text or messages, after an earlier response if one is named."""
        body = await bodies.read(http, ResponsesRequest)
        asking.check_model(body.model)
        _check_include(body)
        owner, answer = http.state.owner, Answer(body, service.engine.tokenizer)
        job = await _job(asking, template, owner, body, answer)
        stack = ExitStack()
        try:
            if job.place is not None:
                stack.enter_context(job.place)
            stack.enter_context(service.admitted(owner))
            running = stack.enter_context(Running(service, job))
            if body.stream:
                events = running.events()
                first = await unless_disconnected(http, anext(events))
                parts = _stream(store, job, answer, chained(first, events))
                return HoldingResponse(parts, "text/event-stream", {"Cache-Control": "no-cache"}, stack.pop_all())
            outcome = await unless_disconnected(http, gather(running, job))
            made = await to_thread.run_sync(answer.whole, outcome)
            await _keep(store, job, outcome, answer.id, made)
            return await json_answer(made, is_large(outcome))
        finally:
            stack.close()

    @routes.get("/{response_id}", response_model=None)
    async def one(response_id: str, http: Request) -> Response:
        """A response that was kept."""
        for key in ("stream", "starting_after"):
            if http.query_params.get(key, "false").lower() != "false":
                message = f"{key}: a response that is kept is given whole"
                raise ApiError(400, message, "invalid_value", key)
        record = await to_thread.run_sync(_kept, store, http.state.owner, response_id)
        return Response(record.note, media_type="application/json")

    @routes.delete("/{response_id}")
    async def delete(response_id: str, http: Request) -> dict[str, Any]:
        """Remove a response and its context."""
        owner = http.state.owner
        record = await to_thread.run_sync(_kept, store, owner, response_id)
        await to_thread.run_sync(store.delete, owner, record.id)
        return {"id": response_id, "object": "response", "deleted": True}

    return routes


def _check_include(body: ResponsesRequest) -> None:
    for one in body.include or ():
        if one != LOGPROBS:
            raise ApiError(
                400, f"include: {one[:80]!r} is not there; there is {LOGPROBS!r}", "invalid_value", "include"
            )


def _kept(store: ContextStore, owner: str, response_id: str) -> Any:
    record = None
    if response_id.startswith("resp_"):
        with suppress(NoContextError):
            record = store.get(owner, response_id)
    if record is None or record.note is None:
        raise ApiError(404, f"no response {response_id[:80]!r} is kept", "response_not_found", "response_id")
    return record


async def _job(asking: Asking, template: ChatTemplate, owner: str, body: ResponsesRequest, answer: Answer) -> Job:
    if body.previous_response_id is not None:
        body.context = body.previous_response_id
    if isinstance(body.input, str | LongText):
        messages: list[Message] = [Message(role="user", content=body.input)]
    else:
        messages = await to_thread.run_sync(_resolved, asking.store, owner, body.input)
        if not messages:
            raise ApiError(400, "input: nothing in it is for the model", "invalid_value", "input")
    if body.instructions is not None:
        messages = [Message(role="system", content=body.instructions), *messages]
    written = await to_thread.run_sync(template.write, messages, Template(body.context is not None))
    most = body.max_output_tokens or asking.default_tokens
    wants = body.top_logprobs is not None or LOGPROBS in (body.include or ())
    logprobs = (body.top_logprobs or 0) if wants else None
    stops = stops_of(body, template.stops)
    asked = Asked([written.prompt], most, logprobs, stops, "input", marks=written.marks)
    if body.text is not None and body.text.format is not None:
        method, value = schema_or_object("text.format", body.text.format.type, body.text.format)
        asked.form = None if value is None else ("text.format", made_by(method, value))
    seconds = asking.service.settings.response_seconds
    save = None if body.store is False else SaveContext(name=answer.id, expires_in=seconds)
    try:
        return await asking.job(owner, body, asked, save)
    except NoContextError:
        if body.previous_response_id is None:
            raise
        message = f"previous_response_id: no response {body.previous_response_id!r} is kept"
        raise ApiError(400, message, "previous_response_not_found", "previous_response_id") from None


def _resolved(store: ContextStore, owner: str, items: Any) -> list[Message]:
    """The items as messages; answers that are only named are looked up.

    Raises:
        ApiError: 400 for one that is not kept.
    """
    messages: list[Message] = []
    for place, item in enumerate(items):
        match item:
            case InputReasoning():
                continue
            case InputReference():
                message = Message(role="assistant", content=_referred(store, owner, item.id, f"input.{place}.id"))
            case InputCall() | InputCallOutput():
                message = item.as_message()
            case _:
                message = item
        before = messages[-1] if messages else None
        if isinstance(item, InputCall) and before is not None and before.role == "assistant":
            # what an answer said and the calls that it made are one message
            messages[-1] = before.model_copy(
                update={"tool_calls": [*(before.tool_calls or ()), *(message.tool_calls or ())]}
            )
        else:
            messages.append(message)
    return messages


def _referred(store: ContextStore, owner: str, name: str, param: str) -> str:
    try:
        record = _kept(store, owner, f"resp_{name.removeprefix('msg_')}")
    except ApiError:
        raise ApiError(400, f"{param}: no item {name[:80]!r} is kept", "item_not_found", param) from None
    content = json.loads(record.note)["output"][0]["content"]
    return "".join(part["text"] for part in content)


async def _keep(store: ContextStore, job: Job, outcome: Outcome, name: str, made: dict[str, Any]) -> None:
    if job.place is None:
        return
    snapshot, place = outcome.snapshot, job.place
    assert snapshot is not None and job.keep_seconds is not None
    expires, parent = time.time() + job.keep_seconds, None if job.start is None else job.start[0].id

    def create() -> ContextRecord:
        note = b"".join(json_steps(made)).decode()
        return place.fill(lambda: store.create(job.owner, snapshot, name, expires, parent, note))

    await to_thread.run_sync(create)


class Answer:
    """The response object, as far as it is known.

    Attributes:
        id: under which it is kept.
    """

    def __init__(self, body: ResponsesRequest, tokenizer: Tokenizer) -> None:
        name = secrets.token_hex(12)
        self.id, self._item = f"resp_{name}", f"msg_{name}"  # so that the item leads to the response
        self._body, self._tokenizer, self._created = body, tokenizer, int(time.time())

    def envelope(self, status: str) -> dict[str, Any]:
        """The object without output and usage."""
        body = self._body
        said = {"type": "text"} if body.text is None or body.text.format is None else None
        form = said or body.text.format.model_dump(by_alias=True, exclude_none=True)  # type: ignore[union-attr]
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": None if body.instructions is None else str(body.instructions),
            "max_output_tokens": body.max_output_tokens,
            "model": body.model,
            "output": [],
            "parallel_tool_calls": True,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": body.store is not False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": form},
            "tool_choice": "auto",
            "tools": [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": body.truncation or "disabled",
            "usage": None,
            "user": body.user if isinstance(body.user, str) else None,
            "metadata": body.metadata or {},
        }

    def part(self, text: str, tokens: Sequence[TokenChoice]) -> dict[str, Any]:
        """The text as a part of the message."""
        told = tokens if any(token.logprob is not None for token in tokens) else ()
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs_of(self._tokenizer, told)}

    def item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        """The message."""
        return {"id": self._item, "type": "message", "status": status, "role": "assistant", "content": content}

    def whole(self, outcome: Outcome) -> dict[str, Any]:
        """The object when all is there."""
        status = "completed" if outcome.reasons[0] == "stop" else "incomplete"
        part = self.part("".join(outcome.texts.get(0, [])), outcome.tokens.get(0, []))
        made = self.envelope(status) | {"output": [self.item(status, [part])], "usage": self._usage(outcome)}
        if status == "incomplete":
            made["incomplete_details"] = {"reason": "max_output_tokens"}
        return made

    def _usage(self, outcome: Outcome) -> dict[str, Any]:
        usage = outcome.usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": usage["prompt_tokens_details"]["cached_tokens"]},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }

    def delta(self, delta: Delta) -> dict[str, Any]:
        """The event for text that came."""
        told = [token for token in delta.tokens if token.logprob is not None]
        return {**self.place, "content_index": 0, "delta": delta.text, "logprobs": logprobs_of(self._tokenizer, told)}

    @property
    def place(self) -> dict[str, Any]:
        """Which item an event is about."""
        return {"item_id": self._item, "output_index": 0}


async def _stream(
    store: ContextStore, job: Job, answer: Answer, events: AsyncIterator[tuple[int, Event]]
) -> AsyncIterator[bytes]:
    outcome, number = Outcome(job), -1

    def said(kind: str, **fields: Any) -> bytes:
        nonlocal number
        number += 1
        written = b"".join(json_steps({"type": kind, "sequence_number": number, **fields}))
        return b"event: %s\ndata: %s\n\n" % (kind.encode(), written)

    def ended() -> list[bytes]:
        """The events after the text. Must run in a thread: each holds all of it, with its log-probabilities."""
        part = answer.part("".join(outcome.texts.get(0, [])), outcome.tokens.get(0, []))
        done = {**answer.place, "content_index": 0}
        return [
            said("response.output_text.done", **done, text=part["text"], logprobs=part["logprobs"]),
            said("response.content_part.done", **done, part=part),
        ]

    def completed(made: dict[str, Any]) -> list[bytes]:
        return [
            said("response.output_item.done", output_index=0, item=made["output"][0]),
            said(f"response.{made['status']}", response=made),
        ]

    try:
        begun = answer.envelope("in_progress")
        yield said("response.created", response=begun)
        yield said("response.in_progress", response=begun)
        yield said("response.output_item.added", output_index=0, item=answer.item("in_progress", []))
        yield said("response.content_part.added", **answer.place, content_index=0, part=answer.part("", ()))
        async for index, event in events:
            outcome.note(event, index)
            if isinstance(event, Delta) and (event.text or event.tokens):
                yield said("response.output_text.delta", **answer.delta(event))
            elif isinstance(event, Ended):
                for part in await to_thread.run_sync(ended):
                    yield part
        made = await to_thread.run_sync(answer.whole, outcome)
        await _keep(store, job, outcome, answer.id, made)
        for part in await to_thread.run_sync(completed, made):
            yield part
    except Exception as error:
        known = from_exception(error)
        if known is None:
            raise
        yield said("error", code=known.code, message=known.message, param=known.param)
