"""What every request passes on its way to an endpoint and back: key, size and pace of the body, counting, defects."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megalodon.serving.auth import ApiKeys
from megalodon.serving.errors import ApiError, answer_for, body_timeout
from megalodon.serving.metrics import Metrics
from megalodon.serving.settings import Settings


class Gate:
    """ASGI middleware. `scope["state"]["owner"]` is the owner of what the request may touch."""

    def __init__(self, app: ASGIApp, keys: ApiKeys, settings: Settings, metrics: Metrics) -> None:
        self._app, self._keys, self._settings, self._metrics = app, keys, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        async def counted(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                route = getattr(scope.get("route"), "path", "other")
                self._metrics.requests.labels(route, str(message["status"])).inc()
            await send(message)

        try:
            await self._pass(scope, receive, counted)
        except Exception as error:
            if begun:  # half an answer is out: all that can be done is to cut the connection
                raise
            await answer_for(error, f"{scope['method']} {scope['path']}").response()(scope, receive, counted)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        if scope["path"].startswith("/v1"):
            _refuse_other_sites(headers)
            scope.setdefault("state", {})["owner"] = self._keys.owner(headers.get("authorization"))
        limit = self._limit(scope, headers)
        announced = headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > limit:
            raise self._too_large(limit)
        await self._app(scope, self._bounded(receive, limit), send)

    def _limit(self, scope: Scope, headers: Headers) -> int:
        json = headers.get("content-type", "").startswith("application/json")
        upload = scope["path"].startswith("/v1/contexts") and not json
        return self._settings.max_upload if upload else self._settings.max_body

    def _too_large(self, limit: int) -> ApiError:
        self._metrics.refused.labels("body").inc()
        return ApiError(413, f"the body is larger than {limit:,} bytes, the most that is accepted", "body_too_large")

    def _bounded(self, receive: Receive, limit: int) -> Receive:
        seconds, received, complete = self._settings.body_seconds, 0, False

        async def bounded() -> Message:
            nonlocal received, complete
            if complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), seconds)
            except TimeoutError:
                raise body_timeout(seconds) from None
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > limit:
                raise self._too_large(limit)
            return message

        return bounded


def _refuse_other_sites(headers: Headers) -> None:
    """Raise ApiError 403 for what another site's page sends from a visitor's browser, keys or not."""
    origin = headers.get("origin")
    if origin is None:
        return
    try:
        own = urlsplit(origin).netloc == headers.get("host")
    except ValueError:  # such as http://[
        own = False
    if not own:
        raise ApiError(403, f"requests from pages of {origin[:80]} are not accepted", "cross_origin")
