"""`/v1/models`, `/v1/completions` and `/v1/chat/completions`."""

from __future__ import annotations

import time
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Request
from starlette.responses import Response

from megalodon.serving import bodies
from megalodon.serving.asking import Asked, Asking, stops_of
from megalodon.serving.chat import ChatTemplate, Template
from megalodon.serving.errors import ERRORS
from megalodon.serving.formats import ChatFormat, CompletionFormat
from megalodon.serving.generating import respond
from megalodon.serving.schemas import ChatRequest, CompletionRequest


def kv_cache_bytes(config: Any) -> int:
    """Bytes that a transformer with as many layers of this width keeps per token, to compare with: a key and a value
    of the full width in each layer, two bytes a number."""
    return 2 * int(config.num_hidden_layers) * int(config.hidden_size) * 2


def router(asking: Asking, template: ChatTemplate) -> APIRouter:
    """The endpoints."""
    routes = APIRouter(prefix="/v1", responses=ERRORS)
    service, store = asking.service, asking.store
    name, tokenizer = service.settings.model_name, service.engine.tokenizer
    started = int(time.time())
    model: dict[str, Any] = {"id": name, "object": "model", "created": started, "owned_by": "megalodon"}
    model["kv_cache_bytes_per_token"] = kv_cache_bytes(service.engine.model.config)

    @routes.get("/models")
    async def models() -> dict[str, Any]:
        """The models that are served: one."""
        return {"object": "list", "data": [model]}

    @routes.get("/models/{model_id:path}")
    async def one_model(model_id: str) -> dict[str, Any]:
        """One model."""
        asking.check_model(model_id)
        return model

    @routes.post("/completions", response_model=None, openapi_extra=bodies.described(CompletionRequest))
    async def completions(http: Request) -> Response:
        """Continue one or more prompts, each after a context if one is given."""
        body = await bodies.read(http, CompletionRequest)
        most = 16 if body.max_tokens is None else body.max_tokens
        asked = Asked(body.prompt, most, body.logprobs, stops_of(body), tell_end=True, echo=bool(body.echo))
        job = await asking.job(http.state.owner, body, asked, body.saving)
        return await respond(service, store, http, job, CompletionFormat(name, tokenizer, body.logprobs))

    @routes.post("/chat/completions", response_model=None, openapi_extra=bodies.described(ChatRequest))
    async def chat(http: Request) -> Response:
        """Continue a conversation, after a context if one is given."""
        body = await bodies.read(http, ChatRequest)
        asking.check_model(body.model)
        written = await to_thread.run_sync(template.write, body.messages, Template.of(body, body.context is not None))
        lengths = (body.max_completion_tokens, body.max_tokens, asking.default_tokens)
        most = next(one for one in lengths if one is not None)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        stops = stops_of(body, template.stops)
        asked = Asked([written.prompt], most, logprobs, stops, "messages", marks=written.marks)
        job = await asking.job(http.state.owner, body, asked, body.saving)
        return await respond(service, store, http, job, ChatFormat(name, tokenizer, logprobs))

    return routes
