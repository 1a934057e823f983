"""The page at `/` and the files that it is made of: read once, served under names that are known beforehand."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.responses import Response

from megalodon.serving.errors import ApiError

STATIC = Path(__file__).with_name("static")
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
"""Whatever else lies in the folder is not served."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""The page asks nothing of other servers, runs no script but its own, and cannot be framed."""


def router() -> APIRouter:
    """`/` and `/static/{name}`. They need no key: what they hold is the same for everybody."""
    routes = APIRouter(include_in_schema=False)
    files = {path.name: (path.read_bytes(), TYPES[path.suffix]) for path in STATIC.iterdir() if path.suffix in TYPES}

    @routes.get("/")
    async def page() -> Response:
        """The page."""
        return _answer(*files["index.html"])

    @routes.get("/static/{name}")
    async def part(name: str) -> Response:
        """A script or style of the page."""
        if name not in files:
            raise ApiError(404, f"the page has no file {name[:80]!r}", "not_found")
        return _answer(*files[name])

    return routes


def _answer(content: bytes, kind: str) -> Response:
    return Response(content, headers=HEADERS, media_type=kind)
