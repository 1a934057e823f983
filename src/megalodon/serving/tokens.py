"""`/v1/embeddings`, `/tokenize` and `/detokenize`."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from anyio import to_thread
from fastapi import APIRouter, Request
from starlette.responses import Response, StreamingResponse

from megalodon.data.tokenizer import Tokenizer
from megalodon.inference.hidden import Mean
from megalodon.serving import bodies
from megalodon.serving import prompts as on_their_way
from megalodon.serving.asking import Asking
from megalodon.serving.chat import ChatTemplate, Template
from megalodon.serving.errors import ERRORS, ApiError
from megalodon.serving.formats import spelled
from megalodon.serving.generating import Job, Outcome, Running, gather, unless_disconnected
from megalodon.serving.responses import json_answer
from megalodon.serving.schemas import DetokenizeRequest, EmbeddingsRequest, TokenizeRequest
from megalodon.serving.texts import Prompt

PART = 1 << 14
"""Tokens that are written at a time."""


def router(asking: Asking, template: ChatTemplate) -> APIRouter:
    """The endpoints."""
    routes = APIRouter(responses=ERRORS)
    service, tokenizer = asking.service, asking.service.engine.tokenizer

    @routes.post("/v1/embeddings", response_model=None, openapi_extra=bodies.described(EmbeddingsRequest))
    async def embeddings(http: Request) -> Response:
        """The mean of the final hidden states of each text: one vector each, of the model's width, not normalised."""
        body = await bodies.read(http, EmbeddingsRequest)
        asking.check_model(body.model)
        width = int(service.engine.model.config.hidden_size)
        if body.dimensions not in (None, width):
            message = f"dimensions: {body.dimensions} is not {width}, the only number that this model has"
            raise ApiError(400, message, "invalid_value", "dimensions")
        texts: list[Prompt] = body.input
        for text in texts:
            on_their_way.check(text, tokenizer, service.settings.max_prompt_tokens, "input")
            if on_their_way.is_empty(text):
                raise ApiError(400, "input: a text is empty; give at least one character", "empty_prompt", "input")
        at_once = min(service.settings.max_choices, service.engine.slots)
        job = Job(http.state.owner, texts, None, at_once=at_once, watch=Mean)
        with service.admitted(job.owner), Running(service, job) as running:
            outcome = await unless_disconnected(http, gather(running, job))
            found = await to_thread.run_sync(_embedded, body, running, outcome)
            return await json_answer(found, large=len(texts) > 1)

    @routes.post("/tokenize", response_model=None, openapi_extra=bodies.described(TokenizeRequest))
    async def tokenize(http: Request) -> Response:
        """The token ids of a text or a conversation."""
        body = await bodies.read(http, TokenizeRequest)
        asking.check_model(body.model)
        if body.messages is not None:
            prompt = (await to_thread.run_sync(template.write, body.messages, Template.of(body, False))).prompt
        else:
            prompt = body.prompt if body.prompt is not None else body.content  # type: ignore[assignment]  # one is given
        on_their_way.check(prompt, tokenizer, service.settings.max_prompt_tokens)
        strings = bool(body.return_token_strs or body.with_pieces)
        written = _tokenized(prompt, tokenizer, service.settings.max_prompt_tokens, strings)
        return StreamingResponse(written, media_type="application/json")

    @routes.post("/detokenize", response_model=None, openapi_extra=bodies.described(DetokenizeRequest))
    async def detokenize(http: Request) -> Response:
        """The text of token ids."""
        body = await bodies.read(http, DetokenizeRequest)
        asking.check_model(body.model)
        ids: np.ndarray = body.tokens
        on_their_way.check(ids, tokenizer, service.settings.max_prompt_tokens, "tokens")
        return StreamingResponse(_detokenized(ids, tokenizer), media_type="application/json")

    return routes


def _tokenized(prompt: Prompt, tokenizer: Tokenizer, most: int, strings: bool) -> Iterator[bytes]:
    """The answer in parts: a text of 16 MB can have as many tokens."""
    parts = [np.asarray(part, dtype=np.int32) for part in on_their_way.encoded(prompt, tokenizer)]
    yield b'{"tokens":['
    yield from _listed(parts, str)
    yield b"]"
    if strings:
        yield b',"token_strs":['
        yield from _listed(parts, lambda token: json.dumps(spelled(tokenizer, token)))
        yield b"]"
    yield b',"count":%d,"max_model_len":%d}' % (sum(map(len, parts)), most)


def _listed(parts: list[np.ndarray], write: Callable[[int], str]) -> Iterator[bytes]:
    between = ""
    for part in parts:
        for start in range(0, len(part), PART):
            yield (between + ",".join(map(write, part[start : start + PART].tolist()))).encode()
            between = ","


def _detokenized(ids: np.ndarray, tokenizer: Tokenizer) -> Iterator[bytes]:
    """The text twice, under vLLM's name for it and under llama.cpp's."""
    for name in ("prompt", "content"):
        yield b'{"prompt":"' if name == "prompt" else b'","content":"'
        decoder = tokenizer.stream_decoder()
        for start in range(0, len(ids), PART):
            yield json.dumps(decoder.feed(ids[start : start + PART]))[1:-1].encode()
        yield json.dumps(decoder.flush())[1:-1].encode()
    yield b'"}'


def _embedded(body: EmbeddingsRequest, running: Running, outcome: Outcome) -> dict[str, Any]:
    data = []
    for number, watch in sorted(running.watches.items()):
        assert isinstance(watch, Mean)
        value: Any = watch.value
        if body.encoding_format == "base64":
            value = base64.b64encode(value.astype("<f4").tobytes()).decode()
        else:
            value = [float(one) for one in value]
        data.append({"object": "embedding", "index": number, "embedding": value})
    usage = outcome.usage()
    counts = {"prompt_tokens": usage["prompt_tokens"], "total_tokens": usage["total_tokens"]}
    return {"object": "list", "data": data, "model": body.model, "usage": counts}
