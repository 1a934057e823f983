"""Uvicorn's HTTP/1.1 with a limit to what a turn of the event loop parses: a body of many one-byte chunks, which takes
seconds to parse, must not hold up the others for as long. What is no HTTP is answered with an error object too."""

from __future__ import annotations

from collections import deque
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from megalodon.serving.errors import ApiError

SLICE = 2048
"""Bytes that are parsed at a time."""


class PacedProtocol(H11Protocol):
    """One connection."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._slices: deque[bytes] = deque()

    def data_received(self, data: bytes) -> None:
        """Bytes have arrived."""
        if not self._slices and len(data) <= SLICE:
            super().data_received(data)
            return
        if not self._slices:
            self.transport.pause_reading()
            self.loop.call_soon(self._go_on)
        self._slices.extend(data[start : start + SLICE] for start in range(0, len(data), SLICE))

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        self._slices.clear()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What arrived is no HTTP: say so, unless an answer has begun, and end the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            answer = ApiError(400, "this is no HTTP/1.1 request that can be read", "invalid_http").response()
            headers = [*answer.raw_headers, (b"connection", b"close")]
            begun = h11.Response(status_code=400, headers=headers)
            for event in (begun, h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _go_on(self) -> None:
        if not self._slices:
            return
        super().data_received(self._slices.popleft())
        if self._slices:
            self.loop.call_soon(self._go_on)
        elif not self.flow.read_paused and not self.transport.is_closing():
            self.transport.resume_reading()
