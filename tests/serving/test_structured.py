"""Structured answers over HTTP: every way to ask for one, alone and among others, and what cannot be kept to."""

from __future__ import annotations

import json
import re
from typing import Literal

import openai
import pytest
from pydantic import BaseModel, Field
from serving_cases import Server

SCHEMA = {
    "type": "object",
    "properties": {"mood": {"enum": ["calm", "wild"]}, "age": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["mood", "age"],
    "additionalProperties": False,
}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
BODY = {"model": "tiny", "prompt": "Who?", "max_tokens": 200, "seed": 2}


class Person(BaseModel):
    """What is asked for."""

    mood: Literal["calm", "wild"]
    age: int = Field(ge=1, le=99)


def ask(server: Server, path: str = "/v1/completions", **body: object) -> dict:
    with server.http() as client:
        return client.post(path, json={**BODY, **body}).json()


@pytest.mark.parametrize(
    ("fields", "right"),
    [
        ({"response_format": JSON_SCHEMA}, r'\{"mood":"(calm|wild)","age":[1-9][0-9]?\}'),
        ({"guided_json": SCHEMA}, r'\{"mood":"(calm|wild)","age":[1-9][0-9]?\}'),
        ({"structured_outputs": {"json": SCHEMA}}, r'\{"mood":"(calm|wild)","age":[1-9][0-9]?\}'),
        ({"guided_regex": r"\d{3}-[a-c]+x"}, r"[0-9]{3}-[a-c]+x"),
        ({"structured_outputs": {"regex": "(ab){3}"}}, "ababab"),
        ({"guided_choice": ["yes", "no", "naïve"]}, "yes|no|naïve"),
        ({"guided_grammar": 'start: "a" "b"'}, "ab"),
    ],
)
def test_answers_have_the_form(server: Server, fields: dict, right: str) -> None:
    for more in ({}, {"temperature": 0}, {"ignore_eos": True}, {"n": 3}):
        for choice in ask(server, **fields, **more)["choices"]:
            assert re.fullmatch(right, choice["text"], re.ASCII), choice
            assert choice["finish_reason"] == "stop"


def test_the_same_alone_and_among_others(server: Server) -> None:
    alone = ask(server, guided_json=SCHEMA, logprobs=1)["choices"][0]
    others = [f"other {i}" for i in range(9)]
    assert (
        ask(server, prompt=[*others, "Who?"], guided_json=SCHEMA, logprobs=1)["choices"][9]["logprobs"]
        == alone["logprobs"]
    )


def test_any_object(server: Server) -> None:
    answer = ask(server, response_format={"type": "json_object"}, max_tokens=400, logit_bias={"125": 30})
    assert isinstance(json.loads(answer["choices"][0]["text"]), dict)


def test_openai_parses_into_a_model(server: Server) -> None:
    client = server.openai()
    asked = [{"role": "user", "content": "Who?"}]
    answer = client.chat.completions.parse(model="tiny", messages=asked, response_format=Person, max_tokens=100)
    assert isinstance(answer.choices[0].message.parsed, Person)
    made = client.responses.parse(model="tiny", input="Who?", text_format=Person, max_output_tokens=100)
    assert isinstance(made.output_parsed, Person)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_json": {"type": "objekt"}}, "guided_json"),
        ({"guided_json": {"type": "object", "properties": {"a": {"not": {}}}}}, "guided_json"),
        ({"guided_regex": "a("}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["a"], "guided_regex": "a"}, "guided_choice"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"structured_outputs": {"regex": "a("}}, "structured_outputs.regex"),
        ({"guided_regex": "a", "min_tokens": 3}, "min_tokens"),
        ({"guided_regex": "a" * 300_000}, "guided_regex"),
        ({"guided_regex": "(a|b)*" * 2000}, "guided_regex"),  # which shows while it is followed
    ],
)
def test_what_cannot_be_kept_to_is_refused(server: Server, fields: dict, param: str) -> None:
    error = ask(server, **fields)["error"]
    assert error["param"] == param and len(error["message"]) < 500, error


def test_plain_text_is_no_form(server: Server) -> None:
    plain = ask(server, max_tokens=5)["choices"]
    assert ask(server, max_tokens=5, response_format={"type": "text"})["choices"] == plain


def test_a_schema_that_is_cut_short_says_so(server: Server) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        server.openai().chat.completions.parse(
            model="tiny", messages=[{"role": "user", "content": "Who?"}], response_format=Person, max_tokens=3
        )
