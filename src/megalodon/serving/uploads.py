"""Texts of any length on their way into contexts: decoded, tokenized and passed on in pieces, never held whole."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from anyio import CapacityLimiter, from_thread, to_thread
from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request

from megalodon.data.reading import read_text
from megalodon.inference.feed import TokenFeed
from megalodon.inference.request import Done, Progress
from megalodon.inference.snapshot import Snapshot
from megalodon.serving import bodies, prompts
from megalodon.serving.calls import UPLOADS, Call, Service, disconnected
from megalodon.serving.errors import ApiError, invalid_value
from megalodon.serving.multipart import Form
from megalodon.serving.schemas import ContextText, NewContext

MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
"""Byte order marks of what is not taken. That of UTF-8 is no part of a text."""


class Body:
    """A request's body as a binary file, for a thread that reads while the event loop receives.

    Attributes:
        received: bytes so far.
    """

    def __init__(self, parts: AsyncIterator[bytes]) -> None:
        self.received = 0
        self._parts = parts

    def read(self, size: int = -1) -> bytes:
        """The next part, of any size; empty at the end."""
        return from_thread.run(self._next)

    async def _next(self) -> bytes:
        async for part in self._parts:
            if part:
                self.received += len(part)
                return part
        return b""


@dataclass
class Upload:
    """A text that is about to arrive, or has as JSON.

    Attributes:
        text: a JSON body's; None for one that streams.
        body: the bytes of one that streams.
    """

    text: ContextText | None
    body: Body
    form: Form | None = None

    @property
    def field(self) -> str:
        """Where the text stands, as errors name it."""
        return "text" if self.text is not None else "body" if self.form is None else "file"

    def fields(self) -> NewContext:
        """What the JSON body, or the form so far, says of the context.

        Raises:
            ApiError: 400 for a name or time that is none.
        """
        if self.text is not None:
            return NewContext(name=self.text.name, expires_in=self.text.expires_in)
        try:
            return NewContext.model_validate({} if self.form is None else self.form.fields)
        except ValidationError as error:
            raise invalid_value(error.errors(include_url=False, include_context=False, include_input=False)) from None


class Uploads:
    """Reads bodies into contexts."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._limiter = CapacityLimiter(UPLOADS)

    async def begin(self, http: Request) -> Upload:
        """What is known of an upload before its text is read.

        Raises:
            ApiError: if the body is not what its media type says.
        """
        kind, said = bodies.media_type(http.headers), http.headers.get("content-type", "")
        if bodies.is_json(kind):
            return Upload(await bodies.read(http, ContextText), Body(_nothing()))
        if not kind.startswith("multipart/"):
            bodies.check_charset(said, "Content-Type")
            return Upload(None, Body(http.stream()))
        if kind != "multipart/form-data":
            message = f"the body is {kind[:80]}: send the text as it is, or a form as multipart/form-data"
            raise ApiError(400, message, "invalid_media_type", "Content-Type")
        form = Form(said, http.stream())
        file = form.file()
        try:
            first = await anext(file, b"")
        except ClientDisconnect:
            raise ApiError(499, "the client has gone", "cancelled") from None
        return Upload(None, Body(_joined(first, file)), form)

    async def read(
        self, http: Request, upload: Upload, start: Snapshot | None, note: Callable[[Progress, int], None]
    ) -> Snapshot:
        """The sequence after `start` and the text. `note` is told how far it is, and how many bytes have been received.

        Raises:
            ApiError: if the text is not what it should be, or the engine refuses it.
        """
        service, body, text = self._service, upload.body, upload.text
        owner, seconds = http.state.owner, service.settings.upload_seconds
        passing: asyncio.Task[None] | None = None
        if text is None:
            feed = TokenFeed()
        else:
            prompts.check(text.text, service.engine.tokenizer, service.settings.max_prompt_tokens, "text")
            feed, passing = await prompts.feed(text.text, service.engine.tokenizer)
        with (
            service.uploading(owner) if text is None else nullcontext(),
            service.call(owner, feed, None, start, keep=True, seconds=seconds) as call,
        ):
            if text is None:
                passing = asyncio.create_task(self._pass_on(upload, feed, call))
            leaving = asyncio.create_task(_end_if_gone(http, passing if text is None else None, call))
            try:
                async for event in call.events():
                    if isinstance(event, Progress):
                        note(event, body.received)
                    elif isinstance(event, Done):
                        assert event.snapshot is not None
                        return event.snapshot
            except ApiError as error:
                if passing is not None and passing.done() and (cause := passing.exception()) is not None:
                    raise cause from None  # the engine only saw a text that was given up
                if error.param is None and error.status in (400, 413):  # what the engine says of a text
                    error.param = upload.field
                raise error
            finally:
                feed.abandon()
                leaving.cancel()
                if passing is not None:
                    passing.cancel()
        raise AssertionError("a call ends with Done or an error")

    async def _pass_on(self, upload: Upload, feed: TokenFeed, call: Call) -> None:
        """Tokenize the body into the feed, as fast as the engine takes it; end the call if that fails."""
        tokenizer = self._service.engine.tokenizer

        def work() -> None:
            for ids in tokenizer.encode_stream(_text(upload.body)):
                if not feed.put(ids):
                    return
            feed.close()

        try:
            await to_thread.run_sync(work, limiter=self._limiter, abandon_on_cancel=True)
        except ClientDisconnect:
            raise ApiError(499, "the client has gone", "cancelled") from None
        except ValueError as error:
            raise ApiError(400, str(error), "invalid_text", upload.field) from None
        finally:
            if not feed.closed:
                call.request.cancel()


async def _end_if_gone(http: Request, receiving: asyncio.Task[None] | None, call: Call) -> None:
    """End the call when the client goes: while the body arrives, `receiving` sees it; afterwards, this does."""
    if receiving is not None:
        await asyncio.wait({receiving})
    await disconnected(http)
    call.request.cancel()


async def save_body(http: Request, path: Path) -> None:
    """Write a body to a file as it arrives."""
    try:
        with path.open("wb") as file:
            async for part in http.stream():
                await to_thread.run_sync(file.write, part)
    except ClientDisconnect:
        raise ApiError(499, "the client has gone", "cancelled") from None


def _text(body: Body) -> Iterator[str]:
    """The body's text without a byte order mark."""
    first = body.read()
    while 0 < len(first) < 4 and (more := body.read()):
        first += more
    for mark, name in MARKS.items():
        if first.startswith(mark):
            raise ValueError(
                f"the body is {name} by its byte order mark: send UTF-8, as iconv -f {name.lower()} -t utf-8 makes it"
            )
    yield from read_text(cast(BinaryIO, _Begun(first, body)), "the body")


class _Begun:
    """A body whose first part has been read."""

    def __init__(self, first: bytes, body: Body) -> None:
        self._first, self._body = first, body

    def read(self, size: int = -1) -> bytes:
        first, self._first = self._first, b""
        return first or self._body.read(size)


async def _nothing() -> AsyncIterator[bytes]:
    if False:
        yield b""


async def _joined(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for part in rest:
        yield part
