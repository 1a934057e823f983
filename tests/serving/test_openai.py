"""The official client on the server: completions, chat, streams, choices, stops, log-probabilities, errors."""

from __future__ import annotations

import json
import shutil
import subprocess

import openai
import pytest
from serving_cases import Server

PROMPT = "It is a truth universally acknowledged"
HELLO = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


def test_models(server: Server) -> None:
    client = server.openai()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt'"):
        client.models.retrieve("gpt")


def test_completion_is_reproducible_and_counts(server: Server) -> None:
    client = server.openai()
    one, two = (client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, seed=3) for _ in range(2))
    assert one.choices[0].text == two.choices[0].text != ""
    assert one.choices[0].finish_reason == "length" and one.object == "text_completion"
    assert (one.usage.prompt_tokens, one.usage.completion_tokens, one.usage.total_tokens) == (len(PROMPT), 20, 58)
    assert two.usage.prompt_tokens_details.cached_tokens == 32
    other = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, seed=4)
    assert other.choices[0].text != one.choices[0].text


def test_a_stream_gives_the_same_text(server: Server) -> None:
    client = server.openai()
    whole = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, seed=3)
    options = {"include_usage": True}
    stream = list(
        client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=20, seed=3, stream=True, stream_options=options
        )
    )
    assert "".join(chunk.choices[0].text for chunk in stream if chunk.choices) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in stream if chunk.choices][-1] == "length"
    assert stream[-1].choices == [] and stream[-1].usage.completion_tokens == 20
    assert all(chunk.usage is None for chunk in stream[:-1]) and len({chunk.id for chunk in stream}) == 1


def test_several_prompts_and_choices(server: Server) -> None:
    client = server.openai()
    answer = client.completions.create(model="tiny", prompt=[PROMPT, "Call me"], n=2, max_tokens=8, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    single = client.completions.create(model="tiny", prompt="Call me", max_tokens=8, seed=1)
    assert answer.choices[2].text == single.choices[0].text != answer.choices[3].text
    stream = client.completions.create(model="tiny", prompt=[PROMPT, "Call me"], n=2, max_tokens=8, seed=1, stream=True)
    texts = dict.fromkeys(range(4), "")
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert list(texts.values()) == [choice.text for choice in answer.choices]


def test_token_ids_as_prompt(server: Server) -> None:
    client = server.openai()
    text = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8, seed=1).choices[0].text
    for prompt in (list(PROMPT.encode()), [list(PROMPT.encode())]):
        assert client.completions.create(model="tiny", prompt=prompt, max_tokens=8, seed=1).choices[0].text == text
    with pytest.raises(openai.BadRequestError, match="ids go up to 255"):
        client.completions.create(model="tiny", prompt=[1, 256])


def test_stop(server: Server) -> None:
    client = server.openai()
    whole = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=40, seed=3).choices[0].text
    stop = whole[15:17]
    cut = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=40, seed=3, stop=["never", stop])
    assert cut.choices[0].text == whole[: whole.index(stop)] and cut.choices[0].finish_reason == "stop"


def test_logprobs_of_completions(server: Server) -> None:
    client = server.openai()
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=6, seed=3, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 6
    assert all(value < 0 for value in logprobs.token_logprobs) and logprobs.text_offset[0] == 0
    for token, value, likeliest in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert likeliest[token] == value and len(likeliest) <= 3, "the chosen token is always among them"
    stream = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=6, seed=3, logprobs=2, stream=True)
    streamed = [value for chunk in stream for value in chunk.choices[0].logprobs.token_logprobs]
    assert streamed == logprobs.token_logprobs


def test_chat(server: Server) -> None:
    client = server.openai()
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, max_completion_tokens=9, seed=3, logprobs=True, top_logprobs=2
    )
    message = answer.choices[0].message
    assert message.role == "assistant" and message.content and answer.object == "chat.completion"
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == 9 and len(tokens[0].top_logprobs) == 2 and tokens[0].bytes is not None
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}]
    again = client.chat.completions.create(model="tiny", messages=[HELLO[0], *parts], max_tokens=9, seed=3)
    assert again.choices[0].message.content == message.content
    expected = client.completions.create(
        model="tiny", prompt="system: Be brief.\nuser: Hello\nassistant:", max_tokens=9, seed=3
    )
    assert message.content == expected.choices[0].text


def test_chat_stream(server: Server) -> None:
    client = server.openai()
    whole = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=9, seed=3, n=2)
    chunks = list(client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=9, seed=3, n=2, stream=True))
    texts, reasons = ["", ""], ["", ""]
    for chunk in chunks:
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices] and reasons == ["length", "length"]
    assert [chunk.choices[0].delta.role for chunk in chunks[:3]] == ["assistant", "assistant", None]
    assert chunks[0].object == "chat.completion.chunk"


@pytest.mark.parametrize(
    ("changes", "status", "param", "message"),
    [
        ({"model": "gpt"}, 404, "model", "no model 'gpt'"),
        ({"prompt": ""}, 400, "prompt", "empty"),
        ({"prompt": "a\0b"}, 400, "prompt", "NUL"),
        ({"max_tokens": -1}, 400, "max_tokens", "greater than or equal to 0"),
        ({"max_tokens": 10**9}, 400, "max_tokens", "the most that is accepted"),
        ({"n": 200}, 400, "n", "less than or equal to 128"),
        ({"n": 17}, 400, "n", "the most that is accepted"),
        ({"temperature": -1}, 400, "temperature", "greater than"),
        ({"top_p": 0}, 400, "top_p", "greater than 0"),
        ({"stop": [""]}, 400, "stop", "at least 1 character"),
        ({"frequency_penalty": 2.5}, 400, "frequency_penalty", "less than or equal to 2"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "no tools"),
        ({"nonsense": 1}, 400, "nonsense", "no such field"),
        ({"context": "ctx_nothing"}, 404, "context", "no context"),
        ({"context": "../../etc/passwd"}, 404, "context", "no context"),
        ({"save_context": True, "n": 2}, 400, "save_context", "n=1"),
        ({"save_context": {"name": "../x"}}, 400, "save_context", "pattern"),
        ({"save_context": {"replace": True}}, 400, "save_context.replace", "needs a context"),
        ({"logprobs": 99}, 400, "logprobs", "less than or equal to 20"),
    ],
)
def test_errors_name_the_field(server: Server, changes: dict, status: int, param: str, message: str) -> None:
    with server.http() as client:
        for stream in (False, True):
            body = {"model": "tiny", "prompt": PROMPT, "stream": stream, **changes}
            answer = client.post("/v1/completions", json=body)
            error = answer.json()["error"]
            assert answer.status_code == status and message in error["message"]
            assert error.keys() == {"message", "type", "param", "code"}
            assert (error["param"] or "").startswith(param)


def test_null_is_the_default(server: Server) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "seed": 1}
    nulls = dict.fromkeys(("n", "stream", "max_tokens", "stop", "temperature", "top_p", "logprobs", "stream_options"))
    with server.http() as client:
        plain, explicit = (client.post("/v1/completions", json=one).json() for one in (body, body | nulls))
    assert plain["choices"] == explicit["choices"] and plain["usage"]["completion_tokens"] <= 16


def test_what_is_no_json_or_no_endpoint(server: Server) -> None:
    with server.http() as client:
        for body in (b"{", b"[]", b"\xff", b'"x"', b"[" * 100_000):
            answer = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
            assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"
        assert client.get("/v1/nothing").status_code == 404 and "error" in client.get("/v1/nothing").json()
        assert client.get("/v1/completions").status_code == 405
        chat = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "top_logprobs": 1}
        assert client.post("/v1/chat/completions", json=chat).json()["error"]["param"] == "top_logprobs"


def test_plain_curl(server: Server) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    body = json.dumps({"model": "tiny", "prompt": PROMPT, "max_tokens": 5, "seed": 1, "stream": True})
    command = [curl, "-sN", f"{server.url}/v1/completions", "-H", "Content-Type: application/json", "-d", body]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n\n")
    assert lines[-2] == "data: [DONE]" and json.loads(lines[0].removeprefix("data: "))["choices"][0]["text"]


def test_operations(server: Server) -> None:
    with server.http() as client:
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/ready").json() == {"status": "ready"}
        client.post("/v1/completions", json={"model": "tiny", "prompt": PROMPT, "max_tokens": 5})
        metrics = client.get("/metrics").text
        for name in (
            "queue_length 0.0",
            "batch_occupancy",
            "generated_tokens_total",
            "time_to_first_token_seconds_bucket",
            "time_per_token_seconds_bucket",
            "state_bytes",
            "prefix_cache_bytes",
            "prefix_cache_hits_total",
            'http_requests_total{route="/v1/completions",status="200"}',
        ):
            assert f"megalodon_{name}" in metrics
        assert "/v1/contexts/{context}/fork" in client.get("/openapi.json").json()["paths"]
