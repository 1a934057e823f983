"""Python clients, each with a chat of three turns, a stream, a structured answer and an error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from serving_cases import Server

KEY = "none"


def test_openai(server: Server, person: type) -> None:
    openai = pytest.importorskip("openai")
    client, messages = server.openai(), []
    for turn in range(3):
        messages.append({"role": "user", "content": f"Turn {turn}"})
        answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=6)
        messages.append(answer.choices[0].message)
    asked = {"model": "tiny", "messages": messages[:1], "max_tokens": 99, "response_format": person}
    with client.chat.completions.stream(**asked) as stream:
        assert [event for event in stream if event.type == "content.delta"]
        assert stream.get_final_completion().choices[0].message.parsed.mood
    parsed = client.chat.completions.parse(**asked)
    assert parsed.choices[0].message.parsed.mood
    with pytest.raises(openai.BadRequestError, match="tools"):
        tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
        client.chat.completions.create(model="tiny", messages=messages[:1], tools=[tool])


def test_litellm(base_url: str, person: type) -> None:
    litellm = pytest.importorskip("litellm")
    litellm.telemetry = False
    common: dict[str, Any] = {"model": "openai/tiny", "api_base": base_url, "api_key": KEY, "num_retries": 0}
    messages: list[Any] = []
    for turn in range(3):
        messages.append({"role": "user", "content": f"Turn {turn}"})
        answer = litellm.completion(messages=messages, max_tokens=6, **common)
        messages.append(answer.choices[0].message)
    first = messages[:1]
    chunks = list(litellm.completion(messages=first, max_tokens=6, stream=True, **common))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    answer = litellm.completion(messages=first, max_tokens=99, response_format=person, **common)
    assert person.model_validate_json(answer.choices[0].message.content)
    assert len(litellm.embedding(input=["a", "b"], **common).data) == 2
    with pytest.raises(litellm.NotFoundError, match="no model"):
        litellm.completion(messages=first, **{**common, "model": "openai/other"})


def test_langchain(base_url: str, person: type) -> None:
    langchain = pytest.importorskip("langchain_openai")
    model = langchain.ChatOpenAI(model="tiny", base_url=base_url, api_key=KEY, max_tokens=99, max_retries=0)
    messages: list[Any] = []
    for turn in range(3):
        messages.append(("user", f"Turn {turn}"))
        messages.append(model.invoke(messages))
    assert "".join(chunk.content for chunk in model.stream("Hello"))
    assert isinstance(model.with_structured_output(person).invoke("Who?"), person)
    with pytest.raises(Exception, match="tools"):
        model.with_structured_output(person, method="function_calling").invoke("Who?")
    responses = langchain.ChatOpenAI(
        model="tiny", base_url=base_url, api_key=KEY, max_tokens=9, use_responses_api=True, max_retries=0
    )
    assert responses.invoke("Hello").content


def test_instructor(server: Server, person: type) -> None:
    instructor = pytest.importorskip("instructor")
    client = instructor.from_openai(server.openai(), mode=instructor.Mode.JSON_SCHEMA)
    messages: list[Any] = [{"role": "user", "content": "Who?"}]
    asked: dict[str, Any] = {"model": "tiny", "response_model": person, "max_tokens": 99, "max_retries": 0}
    for _ in range(3):
        found, raw = client.chat.completions.create_with_completion(messages=messages, **asked)
        assert isinstance(found, person)
        messages += [raw.choices[0].message.model_dump(), {"role": "user", "content": "And who else?"}]
    assert list(client.chat.completions.create_partial(messages=messages[:1], **asked))[-1].mood
    with pytest.raises(Exception, match="tools"):
        instructor.from_openai(server.openai()).chat.completions.create(messages=messages[:1], **asked)


def test_llm(base_url: str, tmp_path: Path) -> None:
    pytest.importorskip("llm")
    model = {"model_id": "ours", "model_name": "tiny", "api_base": base_url, "supports_schema": True}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([model]))
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": KEY, "PYTHONPATH": ""}

    def ask(*arguments: str, status: int = 0) -> str:
        command = [sys.executable, "-m", "llm", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
        return done.stdout + done.stderr

    for turn in range(3):
        assert ask("-m", "ours", "-o", "max_tokens", "9", *(["-c"] if turn else []), f"Turn {turn}").strip()
    assert ask("-m", "ours", "-o", "max_tokens", "9", "--no-stream", "Hello").strip()
    schema = {"type": "object", "properties": {"mood": {"enum": ["calm", "wild"]}}, "required": ["mood"]}
    schema["additionalProperties"] = False
    assert json.loads(ask("-m", "ours", "--schema", json.dumps(schema), "Who?"))["mood"] in ("calm", "wild")
    assert "max_tokens" in ask("-m", "ours", "-o", "max_tokens", "99999999", "Hello", status=1)
