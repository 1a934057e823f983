"""Errors as OpenAI's clients expect them: a status and an object with message, type, param and code."""

from __future__ import annotations

import errno
import logging
import math
import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from megalodon.inference.context_store import ChangedError, NameTakenError, NoContextError, is_read_only
from megalodon.inference.request import Failed, Failure, QueueFullError, StoppingError

_log = logging.getLogger(__name__)

FIELD = re.compile(r"[a-z0-9_]+")
UNION_MEMBERS = ("str", "int", "bool", "list", "float")
"""Pydantic names the type that it tried in the place of the error."""
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
FAILURES = {
    Failure.cancelled: (499, "cancelled"),
    Failure.timeout: (408, "timeout"),
    Failure.empty: (400, "empty_prompt"),
    Failure.too_long: (413, "prompt_too_long"),
    Failure.form: (400, "invalid_value"),
    Failure.stopping: (503, "stopping"),
    Failure.internal: (500, "internal_error"),
}


class ErrorObject(BaseModel):
    """What every refusal and failure answers."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body around it."""

    error: ErrorObject


ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "the request is refused"},
    "5XX": {"model": ErrorBody, "description": "overloaded, stopping, or a defect"},
}
"""For OpenAPI."""


class ApiError(HTTPException):
    """What a request is refused with.

    Attributes:
        status: HTTP's. message: for people. code: for programs. param: the field at fault. retry_after: seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        message = message.encode(errors="replace").decode()  # it may quote what no JSON can hold
        super().__init__(status, message)
        self.status, self.message, self.code, self.retry_after = status, message, code, retry_after
        self.param = None if param is None else param[:200].encode(errors="replace").decode()

    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole answer."""
        headers = {} if self.retry_after is None else {"Retry-After": str(max(1, math.ceil(self.retry_after)))}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def body_timeout(seconds: float) -> ApiError:
    """The error for a body that has stopped arriving."""
    return ApiError(408, f"no more of the body arrived for {seconds:g} seconds", "body_timeout", "body")


def from_failure(failed: Failed) -> ApiError:
    """The error for a request that the engine failed."""
    status, code = FAILURES[failed.failure]
    message = "internal error" if failed.failure is Failure.internal else failed.message
    return ApiError(status, message, code, failed.field, retry_after=5 if status == 503 else None)


def from_exception(error: Exception) -> ApiError | None:
    """The error for what inference raises, or None for a defect."""
    match error:
        case ApiError():
            return error
        case NoContextError():
            return ApiError(404, str(error), "context_not_found", "context")
        case NameTakenError():
            return ApiError(409, str(error), "name_taken", "name")
        case ChangedError():
            return ApiError(409, str(error), "context_changed", "context")
        case QueueFullError():
            return ApiError(503, f"the server is overloaded: {error}", "overloaded", retry_after=2)
        case StoppingError():
            return ApiError(503, "the server is stopping", "stopping", retry_after=5)
        case ValueError():
            return ApiError(400, str(error), "invalid_value", "body")
        case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return ApiError(507, "the server's disk is full: delete contexts, or ask the operator", "disk_full")
        case OSError() if is_read_only(error):
            return ApiError(507, "the server's contexts can be read but not changed: ask the operator", "read_only")
    return None


def answer_for(error: Exception, request: str) -> ApiError:
    """The error for whatever was raised; a defect is logged, and tells the client nothing."""
    known = from_exception(error)
    if known is None:
        _log.error("%s failed", request, exc_info=error)
        known = ApiError(500, "internal error", "internal_error")
    return known


def invalid_value(errors: Sequence[Any]) -> ApiError:
    """The error for what Pydantic found: of several (a value may fit none of some types) the most specific one."""
    error = max(errors, key=lambda error: len(error["loc"]))
    parts = [str(part) for part in error["loc"] if part not in ("body", "query", "path")]
    param = ".".join(part for part in parts if FIELD.fullmatch(part) and part not in UNION_MEMBERS) or "body"
    said = str(error["msg"]).removeprefix("Value error, ")
    return ApiError(400, f"{param}: {said}", "invalid_value", param)


def install(app: FastAPI) -> None:
    """Have every error but defects answered in this form; the gate answers those."""

    async def known(_: Request, error: Exception) -> JSONResponse:
        found = from_exception(error)
        if found is None:  # a broken disk, say: a defect, which the gate answers
            raise error
        return found.response()

    of_inference = (NoContextError, NameTakenError, ChangedError, QueueFullError, StoppingError)
    for kind in (ApiError, *of_inference, ValueError, OSError):
        app.add_exception_handler(kind, known)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return invalid_value(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        response = ApiError(error.status_code, str(error.detail), None).response()
        response.headers.update(error.headers or {})
        return response
