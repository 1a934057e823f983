"""OpenAI's batch files without a server: each line is a request to an endpoint, and is answered as that endpoint would.

Lines are `{"custom_id": ..., "method": "POST", "url": "/v1/chat/completions", "body": {...}}`. All are looked at before
anything is generated; what an endpoint refuses then becomes that line's answer, as OpenAI has it.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megalodon.inference.batch import AHEAD, requests_of, writing, written
from megalodon.inference.engine import Engine
from megalodon.serving.app import create_app
from megalodon.serving.settings import Settings

PREFIX = "batch_req_"
FOREVER = 1e9


class BatchLine(BaseModel):
    """One line of the input."""

    model_config = ConfigDict(extra="forbid")

    custom_id: str = Field(min_length=1)
    method: Literal["POST"]
    url: Literal["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings"]
    body: dict[str, Any]


def run_openai_batch(
    engine: Engine,
    source: Path,
    target: Path,
    model_name: str,
    seed: int = 0,
    on_line: Callable[[int], None] | None = None,
) -> int:
    """Answer the lines of `source` that `target` does not have yet; see `inference.batch.run_batch`.

    `model_name` is what the bodies' `model` must be.
    """
    with writing(source, target), tempfile.TemporaryDirectory() as contexts:
        total = sum(1 for _ in _lines(source, model_name))
        done = written(target, requests_of(source, seed), total, lambda answer: answer["id"].removeprefix(PREFIX))
        if on_line is not None:
            on_line(done)
        most = 2**31
        settings = Settings(
            model_name=model_name,
            contexts=contexts,
            max_tokens=most,
            max_prompt_tokens=most,
            max_concurrent=most,
            request_seconds=FOREVER,
        )
        app = create_app(engine, settings)
        return asyncio.run(_answer(app, engine, source, target, model_name, seed, done, on_line))


async def _answer(
    app: Any,
    engine: Engine,
    source: Path,
    target: Path,
    model_name: str,
    seed: int,
    done: int,
    on_line: Callable[[int], None] | None,
) -> int:
    asked = enumerate(zip(_lines(source, model_name), requests_of(source, seed), strict=True))
    lines = ((number, line, request) for number, (line, request) in asked if number >= done)
    most = max(1, min(AHEAD * engine.slots, engine.queue_length) // min(16, engine.slots))
    running: dict[int, asyncio.Task[dict[str, Any]]] = {}
    pending = next(lines, None)
    with target.open("ab") as output:
        while pending is not None or running:
            while pending is not None and len(running) < most * AHEAD:
                number, line, request = pending
                running[number] = asyncio.create_task(_one(app, line, request, seed + number))
                pending = next(lines, None)
            result = await running.pop(done)
            output.write(json.dumps(result, ensure_ascii=False).encode() + b"\n")
            output.flush()
            done += 1
            if on_line is not None:
                on_line(done)
    return done


async def _one(app: Any, line: BatchLine, request: str, seed: int) -> dict[str, Any]:
    body = dict(line.body)
    if line.url != "/v1/embeddings" and body.get("seed") is None:
        body["seed"] = seed
    if line.url == "/v1/responses":
        body.setdefault("store", False)  # there is nobody to go on from it
    status, answer = await _post(app, line.url, json.dumps(body).encode())
    response = {"status_code": status, "request_id": request, "body": answer}
    return {"id": f"{PREFIX}{request}", "custom_id": line.custom_id, "response": response, "error": None}


async def _post(app: Any, path: str, body: bytes) -> tuple[int, Any]:
    """(status, answer) of a request to the application, without a network."""
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    scope = {
        **{"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http"},
        **{"path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"", "headers": headers},
        **{"client": None, "server": None, "state": {}},
    }
    status, parts, sent = 500, [], False

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if sent:
            await asyncio.Event().wait()  # this client never goes away
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            parts.append(message.get("body", b""))

    await app(scope, receive, send)
    return status, json.loads(b"".join(parts))


def _lines(source: Path, model_name: str) -> Iterator[BatchLine]:
    known: set[str] = set()
    with source.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            try:
                line = BatchLine.model_validate_json(raw)
                if line.custom_id in known:
                    raise ValueError(f"custom_id: {line.custom_id[:80]!r} is that of an earlier line")
                if line.body.get("model") != model_name:
                    raise ValueError(f"body.model: {str(line.body.get('model'))[:80]!r} is not {model_name!r}")
                if line.body.get("stream"):
                    raise ValueError("body.stream: a line has one answer; leave it out")
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(map(str, first["loc"])) or "the line"
                raise ValueError(f"{source}:{number}: {where}: {first['msg']}") from None
            except ValueError as error:
                raise ValueError(f"{source}:{number}: {error}") from None
            known.add(line.custom_id)
            yield line
