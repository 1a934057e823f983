"""The policy for fields: ignored ones change nothing, honoured ones do what they say, refused ones are named; and what
the server sent, it takes back."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from pydantic import BaseModel
from serving_cases import Server

from megalodon.inference.sampling import LEAST
from megalodon.serving.fields import policy_of, table, written_into
from megalodon.serving.response_schemas import ResponsesRequest
from megalodon.serving.schemas import ChatRequest, CompletionRequest, EmbeddingsRequest

BODY = {"model": "tiny", "prompt": "It is a truth", "max_tokens": 12, "seed": 5, "logprobs": 2}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 12, "seed": 5}
ANYTHING = [True, 7, "x", ["x"], {"a": {"b": [1]}}, None]
IGNORED = [name for name in CompletionRequest.model_fields if policy_of(CompletionRequest, name) == "ignored"]


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with server.http() as client:
        yield client


def complete(client: httpx.Client, **body: object) -> dict:
    answer = client.post("/v1/completions", json={**BODY, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def refused(client: httpx.Client, param: str, body: dict, path: str = "/v1/completions") -> str:
    answer = client.post(path, json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text
    return answer.json()["error"]["message"]


def test_the_table_in_the_documentation_is_current() -> None:
    docs = Path(__file__).resolve().parents[2] / "docs"
    endpoints = runpy.run_path(str(docs / "make_fields.py"))["ENDPOINTS"]
    text = (docs / "serving.md").read_text(encoding="utf-8")
    assert written_into(text, table(endpoints)) == text, "run: python docs/make_fields.py"
    with pytest.raises(ValueError, match="once each"):
        written_into("no place", "table")


def test_ignored_fields_change_nothing(client: httpx.Client) -> None:
    expected = complete(client)
    assert {"store", "metadata", "user", "service_tier", "safety_identifier", "cache_prompt"} <= set(IGNORED)
    for value in ANYTHING:
        assert complete(client, **dict.fromkeys(IGNORED, value)) == expected
    assert complete(client, tools=[], tool_choice="none", functions=[], function_call="auto") == expected
    chat = [name for name in ChatRequest.model_fields if policy_of(ChatRequest, name) == "ignored"]
    assert {"reasoning_effort", "verbosity", "parallel_tool_calls"} <= set(chat)
    one, two = (
        client.post("/v1/chat/completions", json={**CHAT, **more}).json()["choices"]
        for more in ({}, {name: {"x": 1} for name in chat})
    )
    assert one == two


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("tools", [{"type": "function", "function": {"name": "f"}}]), ("tool_choice", "required")),
        *(("functions", [{"name": "f"}]), ("function_call", {"name": "f"}), ("suffix", "x"), ("best_of", 2)),
        *(("mirostat", 2), ("typical_p", 0.5), ("use_beam_search", True), ("bad_words", ["x"]), ("unheard_of", 1)),
        *(("stop_token_ids", [256]), ("logit_bias", {"x": 1}), ("logit_bias", {"256": 1}), ("min_tokens", 13)),
        *(("frequency_penalty", 3), ("presence_penalty", -2.1), ("top_k", -2), ("seed", 2**63), ("temperature", -1)),
    ],
)
def test_what_would_change_the_meaning_is_refused_by_name(client: httpx.Client, field: str, value: object) -> None:
    refused(client, field, {**BODY, field: value})


@pytest.mark.parametrize(
    "off", [{"suffix": ""}, {"mirostat": 0}, {"typical_p": 1.0}, {"best_of": 1}, {"bad_words": []}]
)
def test_values_that_ask_for_nothing_are_taken(client: httpx.Client, off: dict) -> None:
    assert complete(client, **off) == complete(client)


def test_ends(client: httpx.Client) -> None:
    whole = complete(client, max_tokens=40, ignore_eos=True)
    assert whole == complete(client, max_tokens=40, ignore_end=True) and whole["finish_reason"] == "length"
    text, tokens = whole["text"], whole["logprobs"]["tokens"]
    place = next(i for i, token in enumerate(tokens) if i > 8 and len(token) == 1 and token not in tokens[:i])
    ended = complete(client, max_tokens=40, ignore_eos=True, stop_token_ids=[ord(tokens[place]) % 256, 1])
    assert ended["finish_reason"] == "stop" and text.startswith(ended["text"])
    assert ended["logprobs"]["tokens"] == tokens[: place + 1], "the token that ended it is told, not shown"
    longer = complete(client, max_tokens=40, ignore_eos=True, stop_token_ids=[ord(tokens[place])], min_tokens=place + 5)
    assert len(longer["logprobs"]["tokens"]) >= place + 5
    stop = text[9]
    assert len(complete(client, max_tokens=40, ignore_eos=True, stop=stop, min_tokens=30)["text"]) >= 25


def test_penalties_and_bias(client: httpx.Client) -> None:
    greedy = {"temperature": 0, "max_tokens": 30, "ignore_eos": True, "logprobs": None}
    plain = complete(client, **greedy)
    assert complete(client, **greedy, logit_bias={"101": 100})["text"] == "e" * 30
    assert complete(client, **greedy, logit_bias={"101": 0}, top_k=-1, min_p=None) == plain
    once = complete(client, **greedy, presence_penalty=2, logit_bias={"101": 100, "102": 99})["text"]
    assert once[:2] == "ef", "a token that is there already loses two"
    falling = complete(client, **greedy, frequency_penalty=2, logit_bias={"101": 100, "102": 97})["text"]
    assert falling[0] == "e" and "f" in falling[1:4], "and more each time"
    for one, two in (({"repeat_penalty": 1.7}, {"repetition_penalty": 1.7}), ({"temperature": 1e-8}, {})):
        assert complete(client, **{**greedy, **one}) == complete(client, **{**greedy, **two})
    assert LEAST > 1e-8
    seeds = [complete(client, seed=seed) for seed in (2**63 - 1, 2**63 - 1, 2**63 - 2, -(2**63))]
    assert seeds[0] == seeds[1] != seeds[2] and seeds[3]


def test_no_tokens_and_usage_as_it_comes(client: httpx.Client, server: Server) -> None:
    answer = client.post("/v1/completions", json={**BODY, "max_tokens": 0, "n": 2}).json()
    assert [(choice["text"], choice["finish_reason"]) for choice in answer["choices"]] == [("", "length")] * 2
    assert answer["usage"]["completion_tokens"] == 0 and answer["usage"]["prompt_tokens"] == len(BODY["prompt"])
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = list(server.openai().completions.create(**{**BODY, "stream": True, "stream_options": options}))
    so_far = [chunk.usage.completion_tokens for chunk in stream]
    assert so_far == sorted(so_far) and so_far[0] >= 1 and so_far[-1] == 12
    assert {chunk.usage.prompt_tokens for chunk in stream} == {len(BODY["prompt"])}
    chat = client.post("/v1/chat/completions", json={**CHAT, "max_tokens": 0}).json()["choices"][0]
    assert chat["message"]["content"] == "" and chat["finish_reason"] == "length"


def test_a_chat_without_a_length_has_the_default_one(serve) -> None:
    server = serve(default_tokens=7)
    with server.http() as client:
        body = {key: value for key, value in CHAT.items() if key != "max_tokens"} | {"ignore_eos": True}
        assert client.post("/v1/chat/completions", json=body).json()["usage"]["completion_tokens"] == 7
        made = client.post("/v1/responses", json={"model": "tiny", "input": "x", "ignore_eos": True}).json()
        assert made["usage"]["output_tokens"] == 7 and made["status"] == "incomplete"


def test_whatever_the_server_sent_is_taken_back(server: Server) -> None:
    client = server.openai()
    messages: list = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    for turn in range(3):
        answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8, seed=turn)
        messages.append(answer.choices[0].message if turn else answer.choices[0].message.model_dump())
        messages.append({"role": "user", "content": f"And turn {turn}?"})
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}}
    messages += [
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "c", "content": "42"},
        {"role": "assistant", "content": None, "refusal": "No."},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}, {"type": "text", "text": "But"}]},
        {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
    ]
    assert client.chat.completions.create(model="tiny", messages=messages, max_tokens=4).choices
    written = client.post("/../tokenize", body={"messages": messages[-5:]}, cast_to=httpx.Response).json()
    text = bytes(written["tokens"]).decode()
    assert '"look"' in text and "tool: 42" in text and "assistant: No.But" in text and text.endswith("assistant:")
    with pytest.raises(openai.BadRequestError, match="needs content"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": None}])


def test_how_a_conversation_ends(client: httpx.Client) -> None:
    def written(**fields: object) -> str:
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well"}]
        answer = client.post("/tokenize", json={"messages": messages, **fields})
        assert answer.status_code == 200, answer.text
        return bytes(answer.json()["tokens"]).decode()

    assert written() == "user: Hi\nassistant: Well\nassistant:"
    assert written(add_generation_prompt=False) == "user: Hi\nassistant: Well" == written(continue_final_message=True)
    refused(
        client,
        "continue_final_message",
        {**CHAT, "add_generation_prompt": True, "continue_final_message": True},
        "/v1/chat/completions",
    )
    refused(client, "chat_template_kwargs", {**CHAT, "chat_template_kwargs": {"messages": []}}, "/v1/chat/completions")


def test_a_template_sees_what_it_is_given(serve) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    template += "{{ mood }}{% if add_generation_prompt %}>{% endif %}"
    with serve(chat_template=template).http() as client:
        body = {"messages": CHAT["messages"], "chat_template_kwargs": {"mood": "calm"}, "add_generation_prompt": True}
        assert bytes(client.post("/tokenize", json=body).json()["tokens"]).decode() == "<user>Hellocalm>"


def test_lists_of_many_prompts(client: httpx.Client) -> None:
    prompts = [f"number {i}" for i in range(2048)]
    answer = client.post(
        "/v1/completions", json={"model": "tiny", "prompt": prompts, "max_tokens": 1, "seed": 1}, timeout=600
    )
    choices = answer.json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(2048))
    alone = client.post("/v1/completions", json={"model": "tiny", "prompt": prompts[1999], "max_tokens": 1, "seed": 1})
    assert choices[1999]["text"] == alone.json()["choices"][0]["text"]
    refused(client, "prompt", {**BODY, "prompt": [*prompts, "one more"]})


def test_all_errors_are_openai_objects(client: httpx.Client) -> None:
    for path in (
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/responses",
        "/v1/embeddings",
        "/tokenize",
        "/detokenize",
    ):
        for body in (b"", b"[]", b"{", b'{"x": 1}', json.dumps({"model": 5}).encode()):
            answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
            assert answer.status_code == 400, (path, body, answer.text)
            assert answer.json()["error"].keys() == {"message", "type", "param", "code"}


def test_every_field_of_the_official_client_has_a_policy(client: httpx.Client) -> None:
    from openai.types import completion_create_params, embedding_create_params
    from openai.types.chat import completion_create_params as chat_create_params
    from openai.types.responses import response_create_params

    bases = {
        CompletionRequest: completion_create_params.CompletionCreateParamsBase,
        ChatRequest: chat_create_params.CompletionCreateParamsBase,
        ResponsesRequest: response_create_params.ResponseCreateParamsBase,
        EmbeddingsRequest: embedding_create_params.EmbeddingCreateParams,
    }
    for model, official in bases.items():
        assert set(official.__annotations__) <= set(model.model_fields)
    for field in ("moderation", "web_search_options", "audio", "background", "conversation", "context_management"):
        for path, body in (("/v1/chat/completions", CHAT), ("/v1/responses", {"model": "tiny", "input": "x"})):
            if (
                (field in ResponsesRequest.model_fields)
                if path.endswith("responses")
                else field in ChatRequest.model_fields
            ):
                refused(client, field, {**body, field: {"x": 1}}, path)


def test_what_the_official_client_parsed_is_taken_back(server: Server) -> None:
    class Mood(BaseModel):
        calm: bool

    client, asked = server.openai(), [{"role": "user", "content": "Calm?"}]
    answer = client.chat.completions.parse(model="tiny", messages=asked, response_format=Mood, max_tokens=30)
    said = answer.choices[0].message
    assert isinstance(said.parsed, Mood)
    for message in (said, said.to_dict()):
        messages = [*asked, message, *asked]
        assert client.chat.completions.create(model="tiny", messages=messages, max_tokens=2).choices
    parsed = client.responses.parse(model="tiny", input="Calm?", text_format=Mood, max_output_tokens=30)
    assert isinstance(parsed.output_parsed, Mood)
    for item in (parsed.output[0], parsed.output[0].model_dump()):
        assert client.responses.create(model="tiny", input=[*asked, item, *asked], max_output_tokens=2).output
