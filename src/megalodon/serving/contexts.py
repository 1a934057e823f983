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
from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from megalodon.inference.context_store import ContextStore
from megalodon.inference.request import Progress
from megalodon.serving import bodies
from megalodon.serving.asking import load
from megalodon.serving.calls import Service
from megalodon.serving.errors import ERRORS, ApiError
from megalodon.serving.generating import describe
from megalodon.serving.responses import HoldingResponse
from megalodon.serving.room import Room
from megalodon.serving.schemas import ContextChange, ContextText, Name, NewContext, Seconds
from megalodon.serving.uploads import Upload, Uploads, save_body

FOLLOWED = 1024
"""Uploads whose progress is remembered."""
BLOCK = 1 << 20
ProgressKey = Annotated[str, Query(pattern="^[0-9A-Za-z-]{8,64}$", description="under which to ask for progress")]
ContextName = Annotated[Name, Query(description="of the new context")]
ExpiresIn = Annotated[Seconds, Query(description="seconds until the context is removed")]
FORM = {
    "type": "object",
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "name": {"type": "string"},
        "expires_in": {"type": "number"},
    },
    "required": ["file"],
}
UPLOAD = bodies.described(ContextText) | {
    "requestBody": {
        "required": True,
        "content": {
            "text/plain": {"schema": {"type": "string"}},
            **bodies.described(ContextText)["requestBody"]["content"],
            "multipart/form-data": {"schema": FORM},
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


def only_known(http: Request) -> None:
    """Raise ApiError 400 for a query key that the endpoint does not know, or one that is there twice."""
    known = {field.alias for field in http.scope["route"].dependant.query_params}
    for key in http.query_params:
        if key not in known:
            message = f"{key[:80] or 'query'}: there is no such query key here"
            raise ApiError(400, message, "unknown_field", key or "query")
        if len(http.query_params.getlist(key)) > 1:
            raise ApiError(400, f"{key}: the query has it twice", "invalid_value", key)


def router(service: Service, store: ContextStore, room: Room) -> APIRouter:
    """The endpoints."""
    routes = APIRouter(prefix="/v1/contexts", responses=ERRORS, dependencies=[Depends(only_known)])
    uploads, followed = Uploads(service), Followed()

    def expiry(seconds: float | None) -> float | None:
        seconds = service.settings.context_seconds if seconds is None else seconds
        return None if seconds is None else time.time() + seconds

    @routes.post("", status_code=201, openapi_extra=UPLOAD)
    async def create(
        http: Request,
        name: ContextName | None = None,
        expires_in: ExpiresIn | None = None,
        progress: ProgressKey | None = None,
    ) -> dict[str, Any]:
        """Read a text of any length into a new context."""
        owner = http.state.owner
        with service.admitted(owner):
            with await to_thread.run_sync(room.reserve, owner, name):
                upload = await uploads.begin(http)
            early = upload.fields().name or name
            with await to_thread.run_sync(room.reserve, owner, early) as place:
                snapshot = await uploads.read(http, upload, None, partial(followed.note, owner, progress))
                fields = upload.fields()
                named, until = fields.name or name, expiry(fields.expires_in or expires_in)
                making = partial(store.create, owner, snapshot, named, until)
                return describe(await to_thread.run_sync(place.fill, making))

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
        if bodies.media_type(http.headers) == "multipart/form-data":
            message = "the body is a form: send the file as it is, as curl --data-binary @FILE does"
            raise ApiError(400, message, "invalid_media_type", "Content-Type")
        with ExitStack() as held:
            held.enter_context(service.admitted(owner))
            place = held.enter_context(await to_thread.run_sync(room.reserve, owner, name))
            path = held.enter_context(store.temporary())
            await save_body(http, path)
            making = partial(store.import_file, owner, path, name, expiry(expires_in))
            return describe(await to_thread.run_sync(place.fill, making))

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

    @routes.patch("/{context}", openapi_extra=bodies.described(ContextChange))
    async def change(context: str, http: Request) -> dict[str, Any]:
        """Give a context another name or expiry; null takes it away."""
        body = await bodies.read(http, ContextChange)
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

    @routes.post("/{context}/extend", openapi_extra=UPLOAD)
    async def extend(context: str, http: Request, progress: ProgressKey | None = None) -> dict[str, Any]:
        """Read more text into a context."""
        owner = http.state.owner
        with service.admitted(owner):
            record, start = await to_thread.run_sync(load, store, owner, context)
            upload = await uploads.begin(http)
            _check_no_changes(upload)
            snapshot = await uploads.read(http, upload, start, partial(followed.note, owner, progress))
            _check_no_changes(upload)
        return describe(await to_thread.run_sync(store.extend, owner, record.id, snapshot, record))

    @routes.post("/{context}/fork", status_code=201, openapi_extra=bodies.described(NewContext))
    async def fork(context: str, http: Request) -> dict[str, Any]:
        """A second context that stands where this one does."""
        owner, body = http.state.owner, await bodies.read(http, NewContext, optional=True)
        with await to_thread.run_sync(room.reserve, owner, body.name) as place:
            record, snapshot = await to_thread.run_sync(load, store, owner, context)
            making = partial(store.create, owner, snapshot, body.name, expiry(body.expires_in), record.id)
            return describe(await to_thread.run_sync(place.fill, making))

    return routes


def _check_no_changes(upload: Upload) -> None:
    fields = upload.fields()
    if fields.name or fields.expires_in:
        raise ApiError(400, "name and expires_in: change them with PATCH", "invalid_value", "name")
