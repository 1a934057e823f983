"""From what a request asks for to a job for the engine: limits, the form of the answer, the context to go on from."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeAlias

from anyio import to_thread

from megalodon.inference.context_store import ContextRecord, ContextStore, NameTakenError
from megalodon.inference.guidance import Grammar, Grammars
from megalodon.inference.request import Generation
from megalodon.inference.snapshot import Snapshot
from megalodon.serving import prompts as on_their_way
from megalodon.serving.calls import Service
from megalodon.serving.errors import ApiError
from megalodon.serving.generating import Job
from megalodon.serving.room import Reservation, Room
from megalodon.serving.schemas import Generating, SaveContext, StreamOptions
from megalodon.serving.texts import Prompt

FORMS_AT_ONCE = 2
Form: TypeAlias = tuple[str, Callable[[Grammars], Grammar]]
"""A field that says what form an answer must have, and how to make the grammar."""


@dataclass
class Asked:
    """What an endpoint makes of its own fields."""

    prompts: list[Prompt]
    max_tokens: int
    logprobs: int | None = None
    stops: tuple[str, ...] = ()
    param: str = "prompt"
    tell_end: bool = False
    echo: bool = False
    form: Form | None = None
    marks: tuple[int, ...] = ()


class Asking:
    """Makes jobs of requests."""

    def __init__(self, service: Service, store: ContextStore, room: Room) -> None:
        self.service, self.store, self.room = service, store, room
        self._grammars = Grammars(service.engine.tokenizer)
        self._forming = asyncio.Semaphore(FORMS_AT_ONCE)

    def check_model(self, asked: str | None) -> None:
        """Raise ApiError 404 for another model than the one that is served."""
        name = self.service.settings.model_name
        if asked is not None and asked != name:
            raise ApiError(404, f"no model {asked[:80]!r}: there is {name!r}", "model_not_found", "model")

    @property
    def default_tokens(self) -> int:
        """The length of an answer whose request states none."""
        return min(self.service.settings.default_tokens, self.service.settings.max_tokens)

    async def job(self, owner: str, body: Generating, asked: Asked, save: SaveContext | None) -> Job:
        """The job, checked: nothing has been read yet, and a new context has its place.

        Raises:
            ApiError: for whatever is out of range or not there. NameTakenError: for the context to be saved.
        """
        self.check_model(body.model)
        goes_on = body.context is not None
        for prompt in asked.prompts:
            on_their_way.check(prompt, self._tokenizer, self.service.settings.max_prompt_tokens, asked.param)
            if on_their_way.is_empty(prompt) and not goes_on:
                message = f"{asked.param}: it is empty; give at least one character, or a context"
                raise ApiError(400, message, "empty_prompt", asked.param)
        choices, most = body.choices, min(self.service.settings.max_choices, self.service.engine.slots)
        if choices > most:
            message = f"n: {choices} are more than {most} choices, the most that is accepted"
            raise ApiError(400, message, "too_many_choices", "n")
        self._check_save(body, asked, save)
        generation = await self._planned(body, asked) if asked.max_tokens else None
        start = None if body.context is None else await to_thread.run_sync(load, self.store, owner, body.context)
        with ExitStack() as held:
            place = None
            if save is not None and not save.replace:
                place = held.enter_context(await to_thread.run_sync(self._reserved, owner, save.name))
            job = Job(owner, asked.prompts, generation, choices, start, save, place)
            held.pop_all()
        job.keep_seconds = (
            self.service.settings.context_seconds if save is None or save.expires_in is None else save.expires_in
        )
        job.stream, job.options = bool(body.stream), body.stream_options or StreamOptions()
        job.echo, job.scores = asked.echo, asked.logprobs if asked.echo else None
        job.marks = asked.marks
        job.at_once = max(1, most // choices)
        return job

    @property
    def _tokenizer(self) -> Any:
        return self.service.engine.tokenizer

    async def _planned(self, body: Generating, asked: Asked) -> Generation:
        """How prompts are continued. To make a form can take seconds: a few at a time, so that they never take all
        threads."""
        form = asked.form or form_of(body)
        if form is None:
            return self._generation(body, asked, None)
        async with self._forming:
            return await to_thread.run_sync(self._generation, body, asked, form)

    def _reserved(self, owner: str, name: str | None) -> Reservation:
        try:
            return self.room.reserve(owner, name)
        except NameTakenError as error:
            raise ApiError(409, f"save_context.name: {error}", "name_taken", "save_context.name") from None

    def _check_save(self, body: Generating, asked: Asked, save: SaveContext | None) -> None:
        if save is None:
            return
        if body.choices != 1 or len(asked.prompts) != 1:
            raise ApiError(400, "save_context: needs one prompt and n=1", "invalid_value", "save_context")
        if save.replace and (body.context is None or save.name or save.expires_in):
            message = "save_context.replace: needs a context, and neither name nor expires_in"
            raise ApiError(400, message, "invalid_value", "save_context.replace")

    def _generation(self, body: Generating, asked: Asked, form: Form | None) -> Generation:
        most, size = self.service.settings.max_tokens, self._tokenizer.vocab_size
        if asked.max_tokens > most:
            message = f"max_tokens: {asked.max_tokens} is more than {most}, the most that is accepted"
            raise ApiError(400, message, "max_tokens_too_large", "max_tokens")
        if (body.min_tokens or 0) > asked.max_tokens:
            message = f"min_tokens: {body.min_tokens} is more than max_tokens, {asked.max_tokens}"
            raise ApiError(400, message, "invalid_value", "min_tokens")
        ends = frozenset(body.stop_token_ids or ())
        if ends and max(ends) >= size:
            raise ApiError(400, f"stop_token_ids: token ids go up to {size - 1}", "invalid_value", "stop_token_ids")
        if form is not None and body.min_tokens:
            message = "min_tokens: where a form is to be kept to, that decides the length"
            raise ApiError(400, message, "invalid_value", "min_tokens")
        return Generation(
            asked.max_tokens,
            body.sampling(),
            body.seed,
            bool(body.resume_generator),
            body.choices,
            asked.stops,
            body.goes_past_end,
            asked.logprobs,
            body.min_tokens or 0,
            body.frequency_penalty or 0.0,
            body.presence_penalty or 0.0,
            _bias(body.logit_bias or {}, size),
            None if form is None else self._grammar(*form),
            ends,
            asked.tell_end,
        )

    def _grammar(self, param: str, form: Callable[[Grammars], Grammar]) -> Grammar:
        try:
            grammar = form(self._grammars)
        except ImportError as error:
            raise ApiError(501, f"{param}: {error}", "not_installed", param) from None
        except (ValueError, NotImplementedError) as error:
            raise ApiError(400, f"{param}: {error}", "invalid_value", param) from None
        grammar.field = param
        return grammar


def form_of(body: Generating) -> Form | None:
    """The form that an answer must have, or None.

    Raises:
        ApiError: 400 if several are asked for, or one without saying which.
    """
    outputs = body.structured_outputs
    asked: dict[str, tuple[str, Any]] = {
        "guided_json": ("json_schema", body.guided_json),
        "guided_regex": ("regex", body.guided_regex),
        "guided_choice": ("choice", body.guided_choice),
        "guided_grammar": ("lark", body.guided_grammar),
    }
    if outputs is not None:
        asked |= {
            "structured_outputs.json": ("json_schema", outputs.json_),
            "structured_outputs.json_object": ("json_object", outputs.json_object or None),
            "structured_outputs.regex": ("regex", outputs.regex),
            "structured_outputs.choice": ("choice", outputs.choice),
            "structured_outputs.grammar": ("lark", outputs.grammar),
        }
    if body.response_format is not None:
        schema = body.response_format.json_schema
        asked["response_format"] = schema_or_object("response_format", body.response_format.type, schema)
    found = [(param, method, value) for param, (method, value) in asked.items() if value is not None]
    if len(found) > 1:
        message = f"{found[1][0]}: {found[0][0]} says already what form the answer is to have"
        raise ApiError(400, message, "invalid_value", found[1][0])
    return None if not found else (found[0][0], made_by(*found[0][1:]))


def made_by(method: str, value: Any) -> Callable[[Grammars], Grammar]:
    """How `Grammars` makes a grammar of what a request holds."""
    return lambda grammars: grammars.json_object() if method == "json_object" else getattr(grammars, method)(value)


def schema_or_object(param: str, kind: str, schema: Any) -> tuple[str, Any]:
    """(method of `Grammars`, its argument, None for plain text) for OpenAI's `response_format` and `text.format`.

    Raises:
        ApiError: 400 for json_schema without a schema.
    """
    if kind == "json_schema" and (schema is None or schema.schema_ is None):
        raise ApiError(400, f"{param}: json_schema needs a schema", "invalid_value", param)
    if kind == "json_schema":
        return "json_schema", schema.schema_
    return "json_object", True if kind == "json_object" else None


def load(store: ContextStore, owner: str, key: str) -> tuple[ContextRecord, Snapshot]:
    """A context and what it holds."""
    record = store.get(owner, key)
    return record, store.load(record)


def _bias(asked: dict[str, float], size: int) -> tuple[tuple[int, float], ...]:
    found: dict[int, float] = {}
    for key, value in asked.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 12 and int(key) < size):
            message = f"logit_bias: {key[:40]!r} is no token id; they go from 0 to {size - 1}"
            raise ApiError(400, message, "invalid_value", "logit_bias")
        found[int(key)] = value
    return tuple(sorted(found.items()))


def stops_of(body: Generating, more: Sequence[str] = ()) -> tuple[str, ...]:
    """The stop strings of a request, and those that the endpoint adds."""
    return (*body.stops, *more)
