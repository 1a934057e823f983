"""`/v1/contexts`: texts that were read once and can be gone on from at any time."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from megalodon.inference.context_store import ContextStore
from megalodon.inference.request import Progress
from megalodon.serving.calls import Service
from megalodon.serving.completions import check_room, load
from megalodon.serving.errors import ERRORS, ApiError
from megalodon.serving.generating import describe
from megalodon.serving.responses import HoldingResponse
from megalodon.serving.schemas import ContextChange, ContextText, Name, NewContext, Seconds
from megalodon.serving.uploads import Uploads, save_body

FOLLOWED = 1024
"""Uploads whose progress is remembered."""
BLOCK = 1 << 20
ProgressKey = Annotated[str, Query(pattern="^[0-9A-Za-z-]{8,64}$", description="under which to ask for progress")]
ContextName = Annotated[Name, Query(description="of the new context")]
ExpiresIn = Annotated[Seconds, Query(description="seconds until the context is removed")]
TEXT_OR_JSON = {
    "requestBody": {
        "required": True,
        "content": {
            "text/plain": {"schema": {"type": "string"}},
            "application/json": {"schema": ContextText.model_json_schema()},
        },
    }
}
FILE = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


class Followed:
    """How far uploads are, for whoever asks under the key that was given with one."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, str], tuple[Progress, int]] = OrderedDict()

    def note(self, owner: str, key: str | None, progress: Progress, received: int) -> None:
        """An upload got on."""
        if key is not None:
            self._known[owner, key] = progress, received
            self._known.move_to_end((owner, key))
            while len(self._known) > FOLLOWED:
                self._known.popitem(last=False)

    def get(self, owner: str, key: str) -> tuple[Progress, int]:
        """How far it is, and bytes received; nothing if it has not begun."""
        return self._known.get((owner, key), (Progress(0, 0, 0, 0), 0))


def router(service: Service, store: ContextStore) -> APIRouter:
    """The endpoints."""
    routes = APIRouter(prefix="/v1/contexts", responses=ERRORS)
    uploads, followed, most = Uploads(service), Followed(), service.settings.max_contexts

    def expiry(seconds: float | None) -> float | None:
        seconds = service.settings.context_seconds if seconds is None else seconds
        return None if seconds is None else time.time() + seconds

    @routes.post("", status_code=201, openapi_extra=TEXT_OR_JSON)
    async def create(
        http: Request,
        name: ContextName | None = None,
        expires_in: ExpiresIn | None = None,
        progress: ProgressKey | None = None,
    ) -> dict[str, Any]:
        """Read a text of any length into a new context."""
        owner = http.state.owner
        await to_thread.run_sync(check_room, store, owner, most)
        with service.admitted(owner):
            snapshot, fields = await uploads.read(http, None, partial(followed.note, owner, progress))
        if fields is not None:
            name, expires_in = fields.name or name, fields.expires_in or expires_in
        return describe(await to_thread.run_sync(store.create, owner, snapshot, name, expiry(expires_in)))

    @routes.get("")
    async def list_contexts(
        http: Request,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        after: Annotated[str | None, Query(max_length=80, description="id of the last one of the page before")] = None,
    ) -> dict[str, Any]:
        """The key's contexts, newest first."""
        records = await to_thread.run_sync(store.owned, http.state.owner)
        if after is not None:
            places = [place for place, record in enumerate(records) if record.id == after]
            if not places:
                raise ApiError(404, f"after: no context {after!r}", "context_not_found", "after")
            records = records[places[0] + 1 :]
        return {"object": "list", "data": [describe(one) for one in records[:limit]], "has_more": len(records) > limit}

    @routes.post("/import", status_code=201, openapi_extra=FILE)
    async def import_context(
        http: Request, name: ContextName | None = None, expires_in: ExpiresIn | None = None
    ) -> dict[str, Any]:
        """Make a context of an exported file."""
        owner = http.state.owner
        await to_thread.run_sync(check_room, store, owner, most)
        with service.admitted(owner), store.temporary() as path:
            await save_body(http, path)
            record = await to_thread.run_sync(store.import_file, owner, path, name, expiry(expires_in))
        return describe(record)

    # before /progress/{key}, so that a context named `progress` can be exported
    @routes.get(
        "/{context}/export",
        response_class=Response,
        responses={200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}},
    )
    async def export(context: str, http: Request) -> Response:
        """The context as one safetensors file."""
        record = await to_thread.run_sync(store.get, http.state.owner, context)
        held = ExitStack()
        path = await to_thread.run_sync(held.enter_context, store.file(record))
        file = held.enter_context(path.open("rb"))  # open, so that it may be replaced or deleted meanwhile

        def blocks() -> Iterator[bytes]:
            while block := file.read(BLOCK):
                yield block

        headers = {
            "Content-Disposition": f'attachment; filename="{record.id}.safetensors"',
            "Content-Length": str(os.fstat(file.fileno()).st_size),
        }
        return HoldingResponse(blocks(), "application/octet-stream", headers, held)

    @routes.get("/progress/{key}")
    async def progress_of(key: str, http: Request) -> dict[str, Any]:
        """How far an upload is that was sent with this `progress` key."""
        now, received = followed.get(http.state.owner, key)
        tokens = {"read": now.read, "arrived": now.arrived, "cached": now.cached}
        return {"object": "progress", **tokens, "received_bytes": received, "state_bytes": now.state_bytes}

    @routes.get("/{context}")
    async def one(context: str, http: Request) -> dict[str, Any]:
        """A context, by id or name."""
        return describe(await to_thread.run_sync(store.get, http.state.owner, context))

    @routes.patch("/{context}")
    async def change(context: str, body: ContextChange, http: Request) -> dict[str, Any]:
        """Give a context another name or expiry; null takes it away."""
        changes: dict[str, Any] = {}
        if "name" in body.model_fields_set:
            changes["name"] = body.name
        if "expires_in" in body.model_fields_set:
            changes["expires"] = None if body.expires_in is None else time.time() + body.expires_in
        return describe(await to_thread.run_sync(lambda: store.update(http.state.owner, context, **changes)))

    @routes.delete("/{context}")
    async def delete(context: str, http: Request) -> dict[str, Any]:
        """Remove a context."""
        record = await to_thread.run_sync(store.get, http.state.owner, context)
        await to_thread.run_sync(store.delete, http.state.owner, record.id)
        return {"id": record.id, "object": "context.deleted", "deleted": True}

    @routes.post("/{context}/extend", openapi_extra=TEXT_OR_JSON)
    async def extend(context: str, http: Request, progress: ProgressKey | None = None) -> dict[str, Any]:
        """Read more text into a context."""
        owner = http.state.owner
        with service.admitted(owner):
            record, start = await to_thread.run_sync(load, store, owner, context)
            snapshot, fields = await uploads.read(http, start, partial(followed.note, owner, progress))
        if fields is not None and (fields.name or fields.expires_in):
            raise ApiError(400, "name and expires_in: change them with PATCH", "invalid_value", "name")
        return describe(await to_thread.run_sync(store.extend, owner, record.id, snapshot, record))

    @routes.post("/{context}/fork", status_code=201)
    async def fork(context: str, body: NewContext, http: Request) -> dict[str, Any]:
        """A second context that stands where this one does."""
        owner = http.state.owner
        await to_thread.run_sync(check_room, store, owner, most)
        record, snapshot = await to_thread.run_sync(load, store, owner, context)
        made = await to_thread.run_sync(store.create, owner, snapshot, body.name, expiry(body.expires_in), record.id)
        return describe(made)

    return routes
