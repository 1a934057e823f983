"""Reading and checking the JSON bodies of requests, beside the event loop."""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import Mapping
from email.message import Message
from functools import cache
from typing import Any, TypeVar

from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI
from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema
from starlette.requests import ClientDisconnect, Request

from megalodon.serving.errors import ApiError, invalid_value
from megalodon.serving.json_body import parse

Body = TypeVar("Body", bound=BaseModel)
LARGE = 1 << 17
"""Bodies of more bytes are checked one after another, so that together they hold up others no more than one does."""


def media_type(headers: Mapping[str, str]) -> str:
    """The media type of a body, in small letters and without parameters."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def check_charset(content_type: str, param: str) -> None:
    """Refuse a text that its media type says is not UTF-8: its bytes could be taken for other characters.

    Raises:
        ApiError: 400, at fault is `param`.
    """
    said = Message()
    said["content-type"] = content_type
    charset = said.get_param("charset", "utf-8")
    try:
        good = codecs.lookup(str(charset).strip()).name in ("utf-8", "utf-8-sig", "ascii")
    except (LookupError, ValueError):
        good = False
    if not good:
        message = f"the text is {str(charset)[:40]} by its media type: send UTF-8, as iconv makes it"
        raise ApiError(400, message, "unsupported_charset", param)


def is_json(kind: str) -> bool:
    """Whether a media type is JSON."""
    return kind in ("application/json", "text/json") or kind.endswith("+json")


async def read(http: Request, model: type[Body], optional: bool = False) -> Body:
    """The body as `model`; `optional`: no body at all is as good as an empty object.

    Raises:
        ApiError: 400 if it is not, with one error that names the field; 499 if the client goes while it arrives.
    """
    kind = media_type(http.headers)
    if optional and not kind and not await receive(http):
        return model.model_validate({})
    if not is_json(kind):
        message = (
            f"the body is {kind[:80] or 'of no stated type'}: send JSON, with the header Content-Type: application/json"
        )
        raise ApiError(400, message, "invalid_media_type", "Content-Type")
    body = await receive(http)
    small, large = _limiters()
    return await to_thread.run_sync(check, body, model, limiter=large if len(body) > LARGE else small)


async def receive(http: Request) -> bytearray:
    """All of a body.

    Raises:
        ApiError: 499 if the client goes while it arrives.
    """
    body = bytearray()
    try:
        async for part in http.stream():
            body += part
    except ClientDisconnect:
        raise ApiError(499, "the client has gone", "cancelled") from None
    return body


def check(body: bytes | bytearray, model: type[Body]) -> Body:
    """A body as `model`. Must run in a thread: see `json_body.parse`.

    Raises:
        ApiError: 400 if it is not.
    """
    fields = parse(body)
    known = {field.alias or name for name, field in model.model_fields.items()}
    for name in fields:
        if name not in known:
            raise ApiError(400, f"{name[:80]}: there is no such field here", "unknown_field", name)
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise invalid_value(error.errors(include_url=False, include_context=False, include_input=False)) from None


_LIMITERS: dict[asyncio.AbstractEventLoop, tuple[CapacityLimiter, CapacityLimiter]] = {}


def _limiters() -> tuple[CapacityLimiter, CapacityLimiter]:
    """(for small bodies, for large ones) of this event loop."""
    loop = asyncio.get_running_loop()
    if loop not in _LIMITERS:
        for old in [one for one in _LIMITERS if one.is_closed()]:
            del _LIMITERS[old]
        _LIMITERS[loop] = CapacityLimiter(4), CapacityLimiter(1)
    return _LIMITERS[loop]


# --- OpenAPI ----------------------------------------------------------------------------------------------------------

_DESCRIBED: list[type[BaseModel]] = []


@cache
def described(model: type[BaseModel]) -> dict[str, Any]:
    """What FastAPI is to say of an endpoint whose body is `model`."""
    _DESCRIBED.append(model)
    reference = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}


def describe_in(app: FastAPI) -> None:
    """Have the application's OpenAPI document hold the schemas of bodies."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        document = make()
        _, schemas = models_json_schema(
            [(model, "validation") for model in _DESCRIBED], ref_template="#/components/schemas/{model}"
        )
        document.setdefault("components", {}).setdefault("schemas", {}).update(schemas.get("$defs", {}))
        return document

    app.openapi = openapi  # type: ignore[method-assign]
