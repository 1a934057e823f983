"""`/v1/responses`, `/v1/embeddings`, `/tokenize`, `/detokenize`: by the official client and plain HTTP."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable

import numpy as np
import openai
import pytest
import torch
from openai.types.responses import ResponseFunctionToolCall, ResponseReasoningItem
from serving_cases import Server

from engine_cases import make_model

ASK = {"model": "tiny", "max_output_tokens": 8, "extra_body": {"seed": 3}}


def test_a_response_and_its_stream(server: Server) -> None:
    client = server.openai()
    made = client.responses.create(input="Hello", instructions="Be brief.", metadata={"a": "b"}, **ASK)
    assert made.object == "response" and made.output_text and made.metadata == {"a": "b"}
    assert made.status == "incomplete" and made.incomplete_details.reason == "max_output_tokens"
    assert made.usage.output_tokens == 8 and made.usage.total_tokens == made.usage.input_tokens + 8
    chat = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
        max_tokens=8,
        seed=3,
    )
    assert made.output_text == chat.choices[0].message.content
    events = list(client.responses.create(input="Hello", instructions="Be brief.", stream=True, **ASK))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        *("response.created", "response.in_progress", "response.output_item.added", "response.content_part.added")
    ]
    assert kinds[-1] == "response.incomplete" and events[-1].response.output_text == made.output_text
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == made.output_text and len(deltas) > 1


def test_going_on_from_a_response(server: Server) -> None:
    client = server.openai()
    first = client.responses.create(input="My name is Ada.", **ASK)
    second = client.responses.create(input="Who am I?", previous_response_id=first.id, **ASK)
    assert second.previous_response_id == first.id
    assert second.usage.input_tokens > first.usage.total_tokens, "what was said before is part of the sequence"
    again = client.responses.create(input="Who am I?", previous_response_id=first.id, **ASK)
    assert again.output_text == second.output_text and again.id != second.id, "a response can be gone on from twice"
    assert client.responses.retrieve(first.id).output_text == first.output_text
    with pytest.raises(openai.BadRequestError, match="given whole"):
        client.responses.retrieve(first.id, stream=True)
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(input="x", previous_response_id=first.id, **ASK)
    assert refused.value.code == "previous_response_not_found" and refused.value.param == "previous_response_id"
    forgotten = client.responses.create(input="x", store=False, **ASK)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(forgotten.id)


def test_what_was_answered_is_taken_back(server: Server) -> None:
    client = server.openai()
    items: list = [{"role": "user", "content": [{"type": "input_text", "text": "Hello"}]}]
    for turn in range(3):
        made = client.responses.create(input=items, store=False, include=["message.output_text.logprobs"], **ASK)
        assert len(made.output[0].content[0].logprobs) == 8
        items += [*(item.model_dump() for item in made.output), {"role": "user", "content": f"And {turn}?"}]
    assert client.responses.create(input=items, **ASK).output_text


def test_items_of_other_models_are_taken_back(serve: Callable[..., Server]) -> None:
    """What OpenAI's clients send again of an answer that called a tool, as they write it: calls are the model's as
    `tool_calls` of a chat are, what tools gave has role tool, and what was thought is not shown again."""
    template = (
        "{% for m in messages %}<{{ m.role }} {{ m.name }} {{ m.tool_call_id }}>{{ m.content }}{{ m.tool_calls }}"
        "{% endfor %}"
    )
    server = serve(chat_template=template)
    client = server.openai()
    thought = ResponseReasoningItem(
        id="rs_1", type="reasoning", summary=[{"text": "Look.", "type": "summary_text"}], encrypted_content="x"
    )
    calls = [
        ResponseFunctionToolCall(
            id=f"fc_{i}", type="function_call", call_id=f"c{i}", name="look", arguments='{"a": 1}', status="completed"
        )
        for i in range(2)
    ]
    said = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Wait."}]}
    items: list = [
        {"role": "user", "content": "Hi"},
        *(thought.model_dump(by_alias=True), said, calls[0].model_dump(by_alias=True), calls[1].to_dict()),
        {"type": "function_call_output", "call_id": "c0", "output": "42", "status": None},
        {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "43"}]},
        {"type": "function_call", "call_id": "c2", "name": "look", "arguments": ""},
    ]
    made = client.responses.create(input=items, **ASK)
    calls_of_chat = [
        {"id": f"c{i}", "type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}} for i in range(2)
    ]
    last = {"id": "c2", "type": "function", "function": {"name": "look", "arguments": ""}}
    chat = client.chat.completions.create(
        model="tiny",
        messages=[
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Wait.", "tool_calls": calls_of_chat},
            {"role": "tool", "content": "42", "tool_call_id": "c0"},
            {"role": "tool", "content": "43", "tool_call_id": "c1"},
            {"role": "assistant", "content": None, "tool_calls": [last]},
        ],
        max_tokens=8,
        seed=3,
    )
    assert made.output_text == chat.choices[0].message.content
    assert made.usage.input_tokens == chat.usage.prompt_tokens
    onward = client.responses.create(input=[items[5]], previous_response_id=made.id, **ASK)
    assert onward.usage.input_tokens > made.usage.total_tokens


@pytest.mark.parametrize(
    ("item", "param"),
    [
        ({"type": "web_search_call", "id": "x"}, "input.1"),
        ({"type": 7}, "input.1"),
        ({"type": ["message"]}, "input.1"),
        ("x", "input.1"),
        ({}, "input.1.role"),
        ({"type": "message", "role": "tool", "content": "x"}, "input.1.role"),
        ({"type": "function_call", "call_id": "c", "arguments": "{}"}, "input.1.name"),
        ({"type": "function_call", "call_id": "c", "name": "f", "arguments": {}}, "input.1.arguments"),
        ({"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}", "x": 1}, "input.1.x"),
        ({"type": "function_call_output", "call_id": "c"}, "input.1.output"),
        ({"type": "function_call_output", "call_id": "c", "output": 7}, "input.1.output"),
        ({"type": "function_call_output", "output": [{"type": "input_image"}]}, "input.1.output.0.type"),
        ({"type": "item_reference"}, "input.1.id"),
        ({"type": "item_reference", "id": "rs_1"}, "input.1.id"),
    ],
)
def test_items_that_are_refused(server: Server, item: object, param: str) -> None:
    with server.http() as client:
        body = {"model": "tiny", "input": [{"role": "user", "content": "x"}, item], "max_output_tokens": 2}
        answer = client.post("/v1/responses", json=body)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text
        nothing = client.post(
            "/v1/responses", json={**body, "input": [{"type": "reasoning", "id": "r", "summary": []}]}
        )
        assert nothing.status_code == 400 and nothing.json()["error"]["param"] == "input"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": ""}, None),
        ({"input": [{"role": "robot", "content": "x"}]}, "input.0.role"),
        ({"background": True}, "background"),
        ({"conversation": "x"}, "conversation"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"include": ["reasoning.encrypted_content"]}, "include"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format"),
        ({"previous_response_id": "resp_x", "context": "y"}, "previous_response_id"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {"a": "x" * 513}}, "metadata.a"),
        ({"metadata": {"a": "x" * 99_999}}, "metadata.a"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata"),
        ({"instructions": "x" * 2_000_000}, "instructions"),
    ],
)
def test_responses_that_are_refused(server: Server, fields: dict, param: str | None) -> None:
    with server.http() as client:
        answer = client.post("/v1/responses", json={"model": "tiny", "input": "x", "max_output_tokens": 2, **fields})
    if param is None:
        assert answer.status_code == 200, "an empty message is a message"
    else:
        assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_field_that_is_only_given_back_spoils_no_answer(server: Server, stream: bool) -> None:
    body = {"model": "tiny", "input": "x", "max_output_tokens": 2, "user": "half \ud83d", "stream": stream}
    with server.http() as client:
        headers = {"Content-Type": "application/json"}
        answer = client.post("/v1/responses", content=json.dumps(body).encode(), headers=headers)
    assert answer.status_code == 200 and '"user":"half ?"' in answer.text and '"error"' not in answer.text[:20]
    assert "surrogates" not in answer.text


def test_a_schema_with_many_numbers(server: Server) -> None:
    schema = {"enum": [i + 0.5 for i in range(30)]}
    text = {"format": {"type": "json_schema", "name": "n", "schema": schema}}
    with server.http() as client:
        made = client.post("/v1/responses", json={"model": "tiny", "input": "x", "text": text}).json()
    assert (
        json.loads(made["output"][0]["content"][0]["text"]) in schema["enum"]
        and made["text"]["format"]["schema"] == schema
    )


def test_many_log_probabilities_whole_and_streamed(server: Server) -> None:
    body = {"model": "tiny", "input": "x", "max_output_tokens": 90, "top_logprobs": 20, "seed": 1, "ignore_eos": True}
    with server.http() as client:
        whole = client.post("/v1/responses", json=body).json()
        content = whole["output"][0]["content"][0]
        assert len(content["logprobs"]) == 90 and len(content["logprobs"][0]["top_logprobs"]) == 20
        assert client.get(f"/v1/responses/{whole['id']}").json() == whole
        lines = client.post("/v1/responses", json={**body, "stream": True}).text.splitlines()
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
        assert events[-1]["response"]["output"][0]["content"] == [content]
        told = [one for event in events if event["type"] == "response.output_text.delta" for one in event["logprobs"]]
        assert told == content["logprobs"]
        chat = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 90, "seed": 1}
        answer = client.post(
            "/v1/chat/completions", json={**chat, "logprobs": True, "top_logprobs": 20, "ignore_eos": True}
        )
        assert answer.json()["choices"][0]["logprobs"]["content"] == content["logprobs"]


def test_a_failing_stream_says_why(serve: Callable[..., Server]) -> None:
    server = serve(request_seconds=0.3, max_tokens=100_000)
    with server.http() as client:
        body = {"model": "tiny", "input": "x", "stream": True, "ignore_eos": True, "max_output_tokens": 90_000}
        with client.stream("POST", "/v1/responses", json=body) as answer:
            lines = [line for line in answer.iter_lines() if line]
    assert lines[-2] == "event: error" and json.loads(lines[-1][6:])["code"] == "timeout"


def test_embeddings_are_means_of_hidden_states(server: Server) -> None:
    client = server.openai()
    texts = ["a", "naïve €", "long text " * 30, "x" * 16, "x" * 17]
    found = client.embeddings.create(model="tiny", input=texts)
    model = make_model()
    for text, one in zip(texts, found.data, strict=True):
        with torch.inference_mode():
            hidden = model.model(torch.tensor([list(text.encode())])).last_hidden_state[0]
        assert np.allclose(one.embedding, hidden.mean(0).numpy(), atol=1e-4)
    assert found.usage.prompt_tokens == sum(len(text.encode()) for text in texts)
    with server.http() as http:
        body = {"model": "tiny", "input": list(texts[1].encode())}
        plain = http.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
        coded = http.post("/v1/embeddings", json={**body, "encoding_format": "base64"}).json()["data"][0]["embedding"]
    alone = np.asarray(plain, np.float32)
    assert np.array_equal(alone, np.frombuffer(base64.b64decode(coded), "<f4"))
    assert np.array_equal(alone, np.asarray(found.data[1].embedding, np.float32)), "the same alone and among others"
    for wrong in ({"input": ""}, {"input": []}, {"dimensions": 7}, {"input": [300]}):
        with pytest.raises(openai.BadRequestError):
            client.embeddings.create(**{"model": "tiny", "input": "x", **wrong})
    many = client.embeddings.create(model="tiny", input=[f"text {i}" for i in range(300)])
    assert [one.index for one in many.data] == list(range(300))


def test_tokens_and_back(server: Server) -> None:
    text = "naïve € 😀 " * 9000
    with server.http() as client:
        for name in ("prompt", "content"):
            made = client.post("/tokenize", json={name: text, "return_token_strs": True}).json()
            assert made["tokens"] == list(text.encode()) and made["count"] == len(made["token_strs"]) == len(
                text.encode()
            )
        back = client.post("/detokenize", json={"tokens": made["tokens"]}).json()
        assert back["prompt"] == back["content"] == text
        assert client.post("/tokenize", json={"prompt": "", "model": "tiny"}).json()["tokens"] == []
        for path, body in (
            *(("/tokenize", {}), ("/tokenize", {"prompt": "a", "content": "b"}), ("/detokenize", {"tokens": [256]})),
            *(("/detokenize", {"tokens": "a"}), ("/tokenize", {"prompt": "a\0"})),
        ):
            answer = client.post(path, json=body)
            assert answer.status_code == 400 and answer.json()["error"]["param"], (path, body, answer.text)
        assert client.post("/tokenize", json={"prompt": "a", "model": "other"}).status_code == 404
