"""What every request passes on its way in and out: host, key, the body's size and pace, counting, defects."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megalodon.serving.auth import ApiKeys
from megalodon.serving.bodies import is_json, media_type
from megalodon.serving.errors import ApiError, answer_for, body_timeout
from megalodon.serving.metrics import Metrics
from megalodon.serving.settings import Settings

OPEN = frozenset(("/", "/health", "/ready", "/metrics", "/docs", "/redoc", "/openapi.json"))
"""Paths that need no key, as does what the page is made of."""
PAGE_FILES = "/static/"
ALIVE = frozenset(("/health", "/ready", "/metrics"))
"""Paths that are answered whatever the host and while the server ends."""


class Drain:
    """Whether the server is ending, and how many requests it still answers."""

    def __init__(self) -> None:
        self.begun = False
        self.running = 0


class Gate:
    """ASGI middleware. `scope["state"]["owner"]` is the owner of what the request may touch."""

    def __init__(self, app: ASGIApp, keys: ApiKeys, settings: Settings, metrics: Metrics, drain: Drain) -> None:
        self._app, self._keys, self._settings, self._metrics, self._drain = app, keys, settings, metrics, drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # whatever sends the answer leaves its body out
            scope = {**scope, "method": "GET"}
        begun = False

        async def counted(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                route = getattr(scope.get("route"), "path", "other")
                self._metrics.requests.labels(route, str(message["status"])).inc()
            await send(message)

        self._drain.running += 1
        try:
            await self._pass(scope, receive, counted)
        except Exception as error:
            if begun:  # half an answer is out: all that can be done is to cut the connection
                raise
            await answer_for(error, f"{scope['method']} {scope['path']}").response()(scope, receive, counted)
        finally:
            self._drain.running -= 1

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        if scope["path"] not in ALIVE:
            try:
                check_host(scope, self._settings.allowed_hosts, self._keys.required)
            except ApiError:
                self._metrics.refused.labels("host").inc()
                raise
            if self._drain.begun:
                raise ApiError(503, "the server is stopping", "stopping", retry_after=5)
        if scope["path"] not in OPEN and not scope["path"].startswith(PAGE_FILES):
            self._refuse_other_sites(headers)
            scope.setdefault("state", {})["owner"] = self._keys.owner(headers.get("authorization"))
        encoding = headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("identity", ""):
            message = f"the body is encoded as {encoding[:80]}, which is not taken here: send it as it is"
            raise ApiError(415, message, "unsupported_encoding", "Content-Encoding")
        limit = self._limit(scope, headers)
        announced = headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > limit:
            raise self._too_large(limit)
        await self._app(scope, self._bounded(receive, limit), send)

    def _limit(self, scope: Scope, headers: Headers) -> int:
        upload = scope["path"].startswith("/v1/contexts") and not is_json(media_type(headers))
        return self._settings.max_upload if upload else self._settings.max_body

    def _too_large(self, limit: int) -> ApiError:
        self._metrics.refused.labels("body").inc()
        return ApiError(
            413, f"the body is larger than {limit:,} bytes, the most that is accepted", "body_too_large", "body"
        )

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

    def _refuse_other_sites(self, headers: Headers) -> None:
        """Raise ApiError 403 for what another site's page sends from a visitor's browser, keys or not."""
        origin = headers.get("origin")
        if origin is None or origin in self._settings.allowed_origins or "*" in self._settings.allowed_origins:
            return
        try:
            own = urlsplit(origin).netloc == headers.get("host")
        except ValueError:  # such as http://[
            own = False
        if not own:
            message = f"requests from pages of {origin[:80]} are not accepted"
            raise ApiError(
                403, f"{message}: the operator can allow them with --allowed-origin", "cross_origin", "Origin"
            )


def check_host(scope: Scope, allowed: Collection[str], keyed: bool) -> None:
    """Refuse a host that is not ours: a page whose name was made to lead here after it was loaded (DNS rebinding) has
    its own name there.

    Raises:
        ApiError: 403 for a host that is not among `allowed`; if there are none, for one that is no loopback name, on a
            loopback address of a server without keys.
    """
    host = _name_of(Headers(scope=scope).get("host", ""))
    address = (scope.get("server") or ("", 0))[0]
    if allowed:
        good = "*" in allowed or any(host == one.lower() for one in allowed)
    else:
        good = keyed or not is_loopback(address) or is_loopback(host)
    if not good:
        message = f"the host {host[:80]!r} is not served here: the operator can allow it with --allowed-host"
        raise ApiError(403, message, "host_not_allowed", "Host")


def _name_of(host: str) -> str:
    """A Host header without its port, in small letters."""
    host = host.strip().lower()
    if host.startswith("["):
        return host.partition("]")[0][1:]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


def is_loopback(name: str) -> bool:
    """Whether a name or address is this machine's own."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name.partition("%")[0]).is_loopback
    except ValueError:
        return False
