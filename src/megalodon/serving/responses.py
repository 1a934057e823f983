"""Answers that are sent as they are made and let go of what they hold however they end; large ones in steps."""

from __future__ import annotations

import json
from collections.abc import AsyncIterable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

from anyio import to_thread
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

BLOCK = 1 << 16
_STEPS = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


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


def json_steps(value: Any) -> Iterator[bytes]:
    """A value as JSON in blocks. Other threads run between them, as they do not while `json.dumps` runs.

    Half of a surrogate pair, which a field may hold that is only given back, becomes a question mark.
    """
    block: list[str] = []
    size = 0
    for part in _STEPS.iterencode(value):
        block.append(part)
        size += len(part)
        if size >= BLOCK:
            yield "".join(block).encode(errors="replace")
            block, size = [], 0
    yield "".join(block).encode(errors="replace")


async def json_answer(value: Any, large: bool) -> Response:
    """A JSON answer; a `large` one, of many thousand numbers, is written beside the event loop."""
    if not large:
        written = _STEPS.encode(value).encode(errors="replace")
    else:
        written = await to_thread.run_sync(lambda: b"".join(json_steps(value)))
    return Response(written, media_type="application/json")
