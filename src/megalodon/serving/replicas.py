"""Replicas of the server on Ray Serve, and the front that sends each request to the one that knows its text.

Ray Serve starts the replicas, watches them and replaces those that die. Each is a whole server on a port of its own;
they share the folder or bucket of contexts. The front passes requests on as they are. Which replica a request goes to
is Ray Serve's choice by the request's *affinity*: its context, or else the beginning of its prompt, which the replica
that saw it last most likely has in its prefix cache.

A request whose replica dies before it has answered is sent again. Once a part of the answer has been passed on, or a
body too large to keep has been, the client gets an error instead.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import suppress
from itertools import chain, islice
from typing import Any

import httpx
import ray
import uvicorn
from anyio import to_thread
from ray import serve
from ray.exceptions import RayError
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from megalodon.serving.app import create_app
from megalodon.serving.auth import ApiKeys
from megalodon.serving.errors import ApiError, body_timeout
from megalodon.serving.gate import ALIVE, Drain, check_host
from megalodon.serving.json_body import Raw, parse
from megalodon.serving.launch import EndingServer, EngineOptions, settle
from megalodon.serving.protocol import PacedProtocol
from megalodon.serving.settings import Settings
from megalodon.serving.texts import LongText, Numbers

APP = "megalodon"
PREFIX_CHARACTERS = 512
"""Prompts that agree in so many characters go to the same replica."""
REMEMBERED = 10_000
"""Affinities that a replica is known for."""
RETRY_SECONDS = 60.0
KEPT_BODY = 16 * 2**20
"""Bodies up to this size are kept until they are answered, so that they can be sent again."""
_HOP_HEADERS = {"connection", "keep-alive", "transfer-encoding", "upgrade", "te", "trailer", "content-length"}


class Replica:
    """One server in an actor of Ray Serve."""

    def __init__(self, options: EngineOptions, settings: Settings) -> None:
        listening = socket.create_server((ray.util.get_node_ip_address(), 0), backlog=512)
        host, port = listening.getsockname()[:2]
        self._url = f"http://{host}:{port}"
        self._engine = options.engine()
        app = create_app(self._engine, settings)
        self._server = uvicorn.Server(uvicorn.Config(app, http=PacedProtocol, log_level="warning", server_header=False))
        settle()
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listening]}, daemon=True)
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise RuntimeError("the replica's server did not start")
            time.sleep(0.01)

    @serve.multiplexed(max_num_models_per_replica=REMEMBERED)
    async def _known(self, affinity: str) -> str:
        return affinity

    async def address(self) -> tuple[str, int]:
        """(URL, process id), after noting that this replica now knows the request's affinity."""
        await self._known(serve.get_multiplexed_model_id())
        return self._url, os.getpid()

    def check_health(self) -> None:
        """Ray Serve asks this; a replica that raises is replaced."""
        if not self._thread.is_alive() or not self._engine.alive:
            raise RuntimeError("the replica's server has stopped")


def affinity(path: str, authorization: str, body: Raw, progress: str | None = None) -> str:
    """What requests that should meet the same replica have in common. Must run in a thread: see `json_body.parse`.

    Args:
        path, authorization, body: the request's.
        progress: the key to follow an upload by.
    """
    parts = path.strip("/").split("/")
    what = ""
    if parts[:3] == ["v1", "contexts", "progress"] and len(parts) == 4:
        progress = parts[3]
    if progress is not None:
        what = f"progress {progress}"
    elif (parts[:2] == ["v1", "contexts"] and len(parts) > 2) or (parts[:2] == ["v1", "responses"] and len(parts) > 2):
        what = f"context {parts[2]}"
    elif body.startswith(b"{"):
        with suppress(ApiError):  # the replica will refuse it
            fields = parse(body)
            context = fields.get("context") or fields.get("previous_response_id")
            said = (fields.get(name) for name in ("prompt", "messages", "instructions", "input"))
            beginning = "".join(islice(_characters([one for one in said if one]), PREFIX_CHARACTERS))
            what = f"context {context!s:.80}" if context else beginning
    return hashlib.sha256(f"{authorization}\n{what}".encode(errors="surrogatepass")).hexdigest()[:32]


def _characters(value: Any) -> Iterator[str]:
    """What a value says, character by character, as far as is asked."""
    match value:
        case LongText():
            yield from chain.from_iterable(value)
        case Numbers():
            for number in value.values:
                yield from f"{number},"
        case dict():
            for key in sorted(value):
                yield from chain(key, ":", _characters(value[key]))
        case list():
            for one in value:
                yield from _characters(one)
        case _:
            yield from f"{value},"


class Front:
    """The ASGI application that passes requests on."""

    def __init__(
        self, handle: Any, body_seconds: float, allowed_hosts: Collection[str] = (), keyed: bool = False
    ) -> None:
        """`body_seconds` and `allowed_hosts` as in `Settings`; `keyed`: the replicas ask for keys."""
        self._handle, self._body_seconds = handle, body_seconds
        self._allowed_hosts, self._keyed = allowed_hosts, keyed
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self._client = httpx.AsyncClient(timeout=httpx.Timeout(None, connect=5.0), limits=limits)
        methods = ["GET", "POST", "PATCH", "DELETE", "PUT", "HEAD", "OPTIONS"]
        self.app = Starlette(routes=[Route("/{path:path}", self.pass_on, methods=methods)])
        self.drain = Drain()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application, which refuses new requests while it ends."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        self.drain.running += 1
        try:
            if scope["path"] not in ALIVE:
                check_host(scope, self._allowed_hosts, self._keyed)
                if self.drain.begun:
                    raise ApiError(503, "the server is stopping", "stopping", retry_after=5)
            await self.app(scope, receive, send)
        except ApiError as error:  # pass_on answers its own
            await error.response()(scope, receive, send)
        finally:
            self.drain.running -= 1

    async def pass_on(self, request: Request) -> Response:
        """Send a request to its replica, again if that dies before it answers."""
        authorization = request.headers.get("authorization", "")
        try:
            body, rest = await self._body(request)
        except ClientDisconnect:
            return Response(status_code=499)
        except ApiError as error:
            return error.response()
        progress, deadline = request.query_params.get("progress"), time.monotonic() + RETRY_SECONDS
        key = await to_thread.run_sync(affinity, request.url.path, authorization, body, progress)
        while True:
            try:
                url, process = await self._handle.options(multiplexed_model_id=key).address.remote()
                content = body if rest is None else _joined(body, rest)
                answer = await self._send(request, url, content)
                return self._passed_back(answer, process)
            except (httpx.TransportError, RayError) as error:
                if rest is not None:
                    message = "the replica that was reading the body was lost: send it again"
                    return ApiError(503, message, "replica_lost", retry_after=1).response()
                if time.monotonic() > deadline:
                    message = f"no replica could answer: {type(error).__name__}"
                    return ApiError(503, message, "replica_lost", retry_after=5).response()
                await asyncio.sleep(0.2)
            except ClientDisconnect:
                return Response(status_code=499)

    async def _body(self, request: Request) -> tuple[bytes, AsyncIterator[bytes] | None]:
        """The body, whole if it is to be kept; otherwise its beginning and the rest."""
        stream, kept = request.stream(), bytearray()
        while True:
            try:
                part = await asyncio.wait_for(anext(stream, None), self._body_seconds)
            except TimeoutError:
                raise body_timeout(self._body_seconds) from None
            if part is None:
                return bytes(kept), None
            kept += part
            if len(kept) > KEPT_BODY:  # of what is passed on from here the replica sees when it stops arriving
                return bytes(kept), stream

    async def _send(self, request: Request, url: str, content: bytes | AsyncIterator[bytes]) -> httpx.Response:
        target = httpx.URL(url).copy_with(raw_path=_raw_path(request))
        headers = [(k, v) for k, v in request.headers.raw if k.decode("latin-1") not in _HOP_HEADERS]
        sent = self._client.build_request(request.method, target, headers=headers, content=content)
        sending = asyncio.create_task(self._client.send(sent, stream=True))
        try:
            while not sending.done():
                await asyncio.wait({sending}, timeout=0.1)
                if isinstance(content, bytes) and await request.is_disconnected():
                    raise ClientDisconnect
            return sending.result()
        finally:
            sending.cancel()

    def _passed_back(self, answer: httpx.Response, process: int) -> Response:
        headers = {k: v for k, v in answer.headers.items() if k not in _HOP_HEADERS - {"content-length"}}
        headers["X-Replica"] = str(process)
        stream = answer.headers.get("content-type", "").startswith("text/event-stream")

        async def parts() -> AsyncIterator[bytes]:
            try:
                async for part in answer.aiter_raw():
                    yield part
            except httpx.TransportError:
                if not stream:
                    raise
                lost = ApiError(503, "the replica that was answering was lost: send the request again", "replica_lost")
                yield f"\n\ndata: {json.dumps(lost.body())}\n\n".encode()
            finally:
                await answer.aclose()

        return StreamingResponse(parts(), answer.status_code, headers)


def _raw_path(request: Request) -> bytes:
    query = request.scope.get("query_string", b"")
    path: bytes = request.scope.get("raw_path") or request.url.path.encode()
    return path + (b"?" + query if query else b"")


async def _joined(beginning: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield beginning
    async for part in rest:
        yield part


def serve_replicas(options: EngineOptions, settings: Settings, replicas: int, host: str, port: int) -> None:
    """Serve with so many replicas until SIGTERM or Ctrl-C, on the Ray cluster that `RAY_ADDRESS` names or a local one.

    Raises:
        ValueError: for less than one replica.
        OSError: if the address cannot be listened on.
    """
    if replicas < 1:
        raise ValueError(f"replicas is {replicas}; it must be 1 or more")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, port), family=family, backlog=512)
    ray.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
    serve.start(proxy_location="Disabled")
    deployment = serve.deployment(
        Replica,
        name="Replica",
        num_replicas=replicas,
        ray_actor_options={"num_cpus": 0 if options.device in (None, "cpu") else 1},
        max_ongoing_requests=1000,
        health_check_period_s=1,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=settings.drain_seconds,
    )
    behind = settings.model_copy(update={"allowed_hosts": ("*",)})  # the front has looked at the host
    handle = serve.run(deployment.bind(options, behind), name=APP, route_prefix=None)
    address = listening.getsockname()
    print(f"megalodon: {settings.model_name} at http://{host}:{address[1]}/ on {replicas} replicas", flush=True)
    keyed = ApiKeys(settings.key_file).required
    front = Front(handle, settings.body_seconds, settings.allowed_hosts, keyed)
    grace = max(1, round(settings.drain_seconds))
    config = uvicorn.Config(front, http=PacedProtocol, log_level="warning", timeout_graceful_shutdown=grace)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn passes the signal on once it has ended itself
    try:
        EndingServer(config, front.drain, settings.drain_seconds).run(sockets=[listening])
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # nothing may interrupt the end of the replicas
        serve.shutdown()
        ray.shutdown()
