"""Answers that are sent as they are made, and let go of what they hold however they end."""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterable, Mapping
from contextlib import ExitStack

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send


class HoldingResponse(StreamingResponse):
    """A stream that closes `held` when it has been sent, fails, or is never begun because the client has gone."""

    def __init__(
        self,
        content: AsyncIterable[bytes] | Iterable[bytes],
        media_type: str,
        headers: Mapping[str, str],
        held: ExitStack,
    ) -> None:
        super().__init__(content, 200, headers, media_type)
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            await super().__call__(scope, receive, send)
