"""Texts of any length on their way into contexts: decoded, tokenized and passed on in pieces, never held whole."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import nullcontext
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from anyio import CapacityLimiter, from_thread, to_thread
from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request

from megalodon.data.reading import read_text
from megalodon.data.tokenizer import Tokenizer
from megalodon.inference.feed import TokenFeed
from megalodon.inference.request import Done, Progress
from megalodon.inference.snapshot import Snapshot
from megalodon.serving.calls import UPLOADS, Call, Service
from megalodon.serving.errors import ApiError, invalid_value
from megalodon.serving.schemas import ContextText


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


class Uploads:
    """Reads bodies into contexts."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._limiter = CapacityLimiter(UPLOADS)

    async def read(
        self, http: Request, start: Snapshot | None, note: Callable[[Progress, int], None]
    ) -> tuple[Snapshot, ContextText | None]:
        """The sequence after `start` and the body: the snapshot, and the JSON object if the body was one.

        `note` is told how far it is, and how many bytes have been received.

        Raises:
            ApiError: if the body is not what it should be, or the engine refuses it.
        """
        service, fields, body = self._service, None, Body(http.stream())
        if http.headers.get("content-type", "").startswith("application/json"):
            fields = await _fields(http)
            feed = TokenFeed(await to_thread.run_sync(_encode, service.engine.tokenizer, fields.text))
        else:
            feed = TokenFeed()
        seconds = service.settings.upload_seconds
        owner, streamed = http.state.owner, fields is None
        with (
            service.uploading(owner) if streamed else nullcontext(),
            service.call(owner, feed, None, start, keep=True, seconds=seconds) as call,
        ):
            passing = None if fields is not None else asyncio.create_task(self._pass_on(body, feed, call))
            try:
                async for event in call.events():
                    if isinstance(event, Progress):
                        note(event, body.received)
                    elif isinstance(event, Done):
                        assert event.snapshot is not None
                        return event.snapshot, fields
            except ApiError as error:
                if passing is not None and passing.done() and (cause := passing.exception()) is not None:
                    raise cause from None  # the engine only saw a text that was given up
                raise error
            finally:
                feed.abandon()
                if passing is not None:
                    passing.cancel()
        raise AssertionError("a call ends with Done or an error")

    async def _pass_on(self, body: Body, feed: TokenFeed, call: Call) -> None:
        """Tokenize the body into the feed, as fast as the engine takes it; end the call if that fails."""
        tokenizer = self._service.engine.tokenizer

        def work() -> None:
            for ids in tokenizer.encode_stream(read_text(cast(BinaryIO, body), "the body")):
                if not feed.put(ids):
                    return
            feed.close()

        try:
            await to_thread.run_sync(work, limiter=self._limiter, abandon_on_cancel=True)
        except ClientDisconnect:
            raise ApiError(499, "the client has gone", "cancelled") from None
        except ValueError as error:
            raise ApiError(400, str(error), "invalid_text") from None
        finally:
            if not feed.closed:
                call.request.cancel()


async def save_body(http: Request, path: Path) -> None:
    """Write a body to a file as it arrives."""
    try:
        with path.open("wb") as file:
            async for part in http.stream():
                await to_thread.run_sync(file.write, part)
    except ClientDisconnect:
        raise ApiError(499, "the client has gone", "cancelled") from None


async def _fields(http: Request) -> ContextText:
    try:
        return ContextText.model_validate(json.loads(await http.body()))
    except ValidationError as error:
        raise invalid_value(error.errors()) from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", "invalid_json") from None


def _encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    return tokenizer.encode(text)
