"""`/v1/explain`: how much each token of a text counted for its last one, and the test of that."""

from __future__ import annotations

from typing import Any

import numpy as np
from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Request

from megalodon.data.tokenizer import Tokenizer
from megalodon.evaluation.explain import explain
from megalodon.inference.engine import Engine
from megalodon.serving import bodies
from megalodon.serving import prompts as on_their_way
from megalodon.serving.asking import Asking
from megalodon.serving.errors import ERRORS, ApiError
from megalodon.serving.formats import spelled
from megalodon.serving.schemas import ExplainRequest
from megalodon.serving.texts import LongText

MOST_TOKENS = 256
"""Tokens, the last of a prompt, that are looked at: the maps of every channel grow with their square."""


def router(asking: Asking) -> APIRouter:
    """The endpoint."""
    routes = APIRouter(prefix="/v1", responses=ERRORS)
    service, engine = asking.service, asking.service.engine
    in_turn = CapacityLimiter(1)  # one at a time, so that it takes no more than a thread from those who wait for text

    @routes.post("/explain", response_model=None, openapi_extra=bodies.described(ExplainRequest))
    async def explained(http: Request) -> dict[str, Any]:
        """The relevance of each token before the last one of a text, by the layers' implicit attention."""
        body = await bodies.read(http, ExplainRequest)
        asking.check_model(body.model)
        prompt = body.prompt[0]
        on_their_way.check(prompt, engine.tokenizer, service.settings.max_prompt_tokens)
        if isinstance(prompt, LongText) or len(prompt) > on_their_way.AT_ONCE:
            message = f"prompt: give at most {on_their_way.AT_ONCE:,} characters; the last {MOST_TOKENS} tokens count"
            raise ApiError(413, message, "prompt_too_long", "prompt")
        with service.admitted(http.state.owner):
            return await to_thread.run_sync(_explained, engine, prompt, body.model, limiter=in_turn)

    return routes


def _explained(engine: Engine, prompt: str | np.ndarray, model: str) -> dict[str, Any]:
    tokenizer = engine.tokenizer
    ids = np.asarray(tokenizer.encode(prompt) if isinstance(prompt, str) else prompt, dtype=np.int64)
    if len(ids) < 2:
        message = "prompt: it has one token or none; the last is explained by those before it"
        raise ApiError(400, message, "invalid_value", "prompt")
    offsets, kept = _offsets(tokenizer, ids)[-MOST_TOKENS:], ids[-MOST_TOKENS:]
    try:
        found = explain(engine.model, kept)
    except ValueError as error:
        raise ApiError(400, f"model: {error}", "not_supported", "model") from None
    return {
        "object": "explanation",
        "model": model,
        "tokens": [spelled(tokenizer, token) for token in kept.tolist()],
        "token_ids": kept.tolist(),
        "text_offset": offsets,
        "logprob": found.log_probability,
        "relevance": [*found.relevance.tolist(), None],
        "logprob_without": found.areas(),
    }


def _offsets(tokenizer: Tokenizer, ids: np.ndarray) -> list[int]:
    """Characters of the text before each token."""
    decoder, offsets, length = tokenizer.stream_decoder(), [], 0
    for token in ids.tolist():
        offsets.append(length)
        length += len(decoder.feed(token))
    return offsets
