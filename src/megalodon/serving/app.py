"""The application: endpoints, limits and errors around one engine and one store of contexts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from anyio import to_thread
from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

import megalodon
from megalodon.inference.context_store import ContextStore
from megalodon.inference.engine import Engine
from megalodon.serving import bodies, completions, contexts, errors, explaining, page, response_api, tokens
from megalodon.serving.asking import Asking
from megalodon.serving.auth import ApiKeys
from megalodon.serving.calls import Service
from megalodon.serving.chat import ChatTemplate
from megalodon.serving.gate import Drain, Gate
from megalodon.serving.metrics import Metrics
from megalodon.serving.room import Room
from megalodon.serving.settings import Settings

SWEEP_SECONDS = 60.0
_log = logging.getLogger(__name__)


def create_app(engine: Engine, settings: Settings) -> FastAPI:
    """An ASGI application. It starts the engine when it starts, and closes it when it ends.

    `app.state.drain.begun = True` has it refuse new requests with 503, `app.state.drain.running` counts those that it
    still answers.

    Raises:
        OSError: if the place for contexts cannot be used, or the key file is missing.
        ValueError: for a chat template or keys that cannot be read.
    """
    keys = ApiKeys(settings.key_file)
    store = ContextStore(settings.contexts, engine.identity)
    metrics = Metrics(engine)
    service = Service(engine, settings, metrics)
    template = ChatTemplate(engine.tokenizer, settings.chat_template)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        sweeping = asyncio.create_task(_sweep(store))
        app.state.ready = True
        yield
        app.state.ready = False
        sweeping.cancel()
        await to_thread.run_sync(engine.close, settings.drain_seconds)

    pages = {} if settings.docs else {"docs_url": None, "redoc_url": None}
    app = FastAPI(title="megalodon", version=megalodon.__version__, lifespan=lifespan, **pages)  # type: ignore[arg-type]
    app.state.ready, app.state.drain = False, Drain()
    errors.install(app)
    asking = Asking(service, store, Room(store, settings.max_contexts))
    app.include_router(completions.router(asking, template))
    app.include_router(response_api.router(asking, template))
    app.include_router(tokens.router(asking, template))
    app.include_router(explaining.router(asking))
    app.include_router(contexts.router(service, store, asking.room))
    app.include_router(page.router())
    _add_operations(app, engine, metrics)
    bodies.describe_in(app)
    gate = {"keys": keys, "settings": settings, "metrics": metrics, "drain": app.state.drain}
    app.add_middleware(Gate, **gate)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "POST", "PATCH", "DELETE"],
            allow_headers=["*"],
        )
    return app


def _add_operations(app: FastAPI, engine: Engine, metrics: Metrics) -> None:
    @app.get("/health")
    async def health() -> Response:
        """Whether the process lives and the engine's thread runs."""
        return JSONResponse({"status": "ok"}) if engine.alive else JSONResponse({"status": "engine stopped"}, 503)

    @app.get("/ready")
    async def ready() -> Response:
        """Whether requests are welcome."""
        ok = app.state.ready and engine.alive and not app.state.drain.begun
        return JSONResponse({"status": "ready" if ok else "not ready"}, 200 if ok else 503)

    @app.get("/metrics", response_class=Response)
    async def scrape() -> Response:
        """Prometheus metrics."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)


async def _sweep(store: ContextStore) -> None:
    while True:
        try:
            await to_thread.run_sync(store.sweep)
        except Exception:  # a bucket has errors of its own; the next sweep may succeed
            _log.exception("expired contexts could not be removed")
        await asyncio.sleep(SWEEP_SECONDS)
