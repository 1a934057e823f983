"""`/v1/models`, `/v1/completions` and `/v1/chat/completions`."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from anyio import to_thread
from fastapi import APIRouter, Request
from starlette.responses import Response

from megalodon.data.tokenizer import Tokenizer
from megalodon.inference.context_store import ContextRecord, ContextStore
from megalodon.inference.request import Generation, TokenChoice
from megalodon.inference.snapshot import Snapshot
from megalodon.serving.calls import Service
from megalodon.serving.chat import ChatTemplate
from megalodon.serving.errors import ERRORS, ApiError
from megalodon.serving.generating import Job, respond
from megalodon.serving.schemas import ChatRequest, CompletionRequest, SaveContext, StreamOptions


def router(service: Service, store: ContextStore, template: ChatTemplate) -> APIRouter:
    """The endpoints."""
    routes = APIRouter(prefix="/v1", responses=ERRORS)
    name, tokenizer = service.settings.model_name, service.engine.tokenizer
    started = int(time.time())
    model = {"id": name, "object": "model", "created": started, "owned_by": "megalodon"}

    @routes.get("/models")
    async def models() -> dict[str, Any]:
        """The models that are served: one."""
        return {"object": "list", "data": [model]}

    @routes.get("/models/{model_id:path}")
    async def one_model(model_id: str) -> dict[str, Any]:
        """One model."""
        _check_model(model_id, name)
        return model

    @routes.post("/completions", response_model=None)
    async def completions(body: CompletionRequest, http: Request) -> Response:
        """Continue one or more prompts, each after a context if one is given."""
        _check_model(body.model, name)
        prompts = await to_thread.run_sync(_prompts, body, tokenizer)
        generation = _generation(service, body, body.max_tokens or 16, body.stops, body.logprobs, len(prompts))
        job = await _job(service, store, http, body, prompts, generation, CompletionFormat(name, tokenizer, generation))
        return await respond(service, store, http, job)

    @routes.post("/chat/completions", response_model=None)
    async def chat(body: ChatRequest, http: Request) -> Response:
        """Continue a conversation, after a context if one is given."""
        _check_model(body.model, name)
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs: needs logprobs to be true", "invalid_value", "top_logprobs")
        prompt = await to_thread.run_sync(template.encode, body.messages, body.context is not None)
        asked = body.max_completion_tokens or body.max_tokens or service.settings.max_tokens
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        generation = _generation(service, body, asked, (*body.stops, *template.stops), logprobs, 1)
        job = await _job(service, store, http, body, [prompt], generation, ChatFormat(name, tokenizer, generation))
        return await respond(service, store, http, job)

    return routes


def _check_model(asked: str, name: str) -> None:
    if asked != name:
        raise ApiError(404, f"no model {asked[:80]!r}: there is {name!r}", "model_not_found", "model")


def _prompts(body: CompletionRequest, tokenizer: Tokenizer) -> list[np.ndarray]:
    """The prompts' ids.

    Raises:
        ApiError: for ids that the tokenizer does not have, or no prompt where there is no context either.
    """
    prompt: Any = body.prompt
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    prompts = [
        tokenizer.encode(one) if isinstance(one, str) else np.asarray(one, dtype=np.int64)
        for one in (prompt if several else [prompt])
    ]
    for ids in prompts:
        if len(ids) and ids.max() >= tokenizer.vocab_size:
            raise ApiError(400, f"prompt: token ids go up to {tokenizer.vocab_size - 1}", "invalid_value", "prompt")
        if not len(ids) and body.context is None:
            raise ApiError(
                400, "prompt: it is empty; give at least one character, or a context", "empty_prompt", "prompt"
            )
    return prompts


def _generation(
    service: Service,
    body: CompletionRequest | ChatRequest,
    max_tokens: int,
    stop: Sequence[str],
    logprobs: int | None,
    prompts: int,
) -> Generation:
    settings, most = service.settings, min(service.settings.max_choices, service.engine.slots)
    if max_tokens > settings.max_tokens:
        message = f"max_tokens: {max_tokens} is more than {settings.max_tokens}, the most that is accepted"
        raise ApiError(400, message, "max_tokens_too_large", "max_tokens")
    if prompts * body.choices > most:
        message = f"n: {prompts} prompts times n={body.choices} are more than {most} choices, the most that is accepted"
        raise ApiError(400, message, "too_many_choices", "n")
    return Generation(
        max_tokens,
        body.sampling(),
        body.seed,
        body.resume_generator,
        body.choices,
        tuple(stop),
        body.ignore_end,
        logprobs,
    )


async def _job(
    service: Service,
    store: ContextStore,
    http: Request,
    body: CompletionRequest | ChatRequest,
    prompts: list[np.ndarray],
    generation: Generation,
    answer: CompletionFormat | ChatFormat,
) -> Job:
    save = body.save_context if isinstance(body.save_context, SaveContext) else None
    if body.save_context is True:
        save = SaveContext()
    if save is not None and (body.choices != 1 or len(prompts) != 1):
        raise ApiError(400, "save_context: needs one prompt and n=1", "invalid_value", "save_context")
    if save is not None and save.replace and (body.context is None or save.name or save.expires_in):
        message = "save_context.replace: needs a context, and neither name nor expires_in"
        raise ApiError(400, message, "invalid_value", "save_context.replace")
    owner = http.state.owner
    if save is not None and not save.replace:
        await to_thread.run_sync(check_room, store, owner, service.settings.max_contexts)
    start = None if body.context is None else await to_thread.run_sync(load, store, owner, body.context)
    options = body.stream_options or StreamOptions()
    return Job(owner, prompts, generation, answer, start, save, bool(body.stream), options)


def load(store: ContextStore, owner: str, key: str) -> tuple[ContextRecord, Snapshot]:
    """A context and what it holds."""
    record = store.get(owner, key)
    return record, store.load(record)


def check_room(store: ContextStore, owner: str, most: int) -> None:
    """Raise ApiError 403 if the owner has as many contexts as one may."""
    if store.count(owner) >= most:
        raise ApiError(
            403, f"this key has {most} contexts, the most that one may have: delete some", "too_many_contexts"
        )


class CompletionFormat:
    """Answers of `/v1/completions`."""

    def __init__(self, model: str, tokenizer: Tokenizer, generation: Generation) -> None:
        self._base = {"id": f"cmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._tokenizer, self._logprobs = tokenizer, generation.logprobs
        self._offsets: dict[int, int] = {}

    def envelope(self, stream: bool) -> dict[str, Any]:
        """What surrounds the choices."""
        return {**self._base, "object": "text_completion"}

    def choice(self, index: int, text: str, tokens: Sequence[TokenChoice], reason: str | None) -> dict[str, Any]:
        """One whole choice, or a part of it."""
        logprobs = None if self._logprobs is None else self._legacy(index, tokens)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    chunk = choice

    def first_chunks(self, choices: int) -> list[dict[str, Any]]:
        """What comes before the text."""
        return []

    def _legacy(self, index: int, tokens: Sequence[TokenChoice]) -> dict[str, Any]:
        texts = [self._tokenizer.decode([token.token]) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(text)
        likeliest = [
            {
                self._tokenizer.decode([other]): value
                for other, value in (*token.likeliest, (token.token, token.logprob))
            }
            for token in tokens
        ]  # the chosen token is always among them, as OpenAI has it
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": likeliest if self._logprobs else None,
            "text_offset": offsets,
        }


class ChatFormat:
    """Answers of `/v1/chat/completions`."""

    def __init__(self, model: str, tokenizer: Tokenizer, generation: Generation) -> None:
        self._base = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._tokenizer, self._logprobs = tokenizer, generation.logprobs

    def envelope(self, stream: bool) -> dict[str, Any]:
        """What surrounds the choices."""
        return {**self._base, "object": "chat.completion.chunk" if stream else "chat.completion"}

    def choice(self, index: int, text: str, tokens: Sequence[TokenChoice], reason: str) -> dict[str, Any]:
        """One whole choice."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._content(tokens), "finish_reason": reason}

    def first_chunks(self, choices: int) -> list[dict[str, Any]]:
        """Each choice begins with its role."""
        return [
            {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            for index in range(choices)
        ]

    def chunk(self, index: int, text: str, tokens: Sequence[TokenChoice], reason: str | None) -> dict[str, Any]:
        """A part of a choice."""
        delta = {"content": text} if reason is None else {}
        return {"index": index, "delta": delta, "logprobs": self._content(tokens), "finish_reason": reason}

    def _content(self, tokens: Sequence[TokenChoice]) -> dict[str, Any] | None:
        if self._logprobs is None or not tokens:
            return None
        return {
            "content": [
                self._token(token.token, token.logprob)
                | {"top_logprobs": [self._token(other, value) for other, value in token.likeliest]}
                for token in tokens
            ],
            "refusal": None,
        }

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        spelled = None if self._tokenizer.token_bytes is None else list(self._tokenizer.token_bytes[token])
        return {"token": self._tokenizer.decode([token]), "logprob": logprob, "bytes": spelled}
