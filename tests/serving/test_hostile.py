"""Requests that nobody means well by: every one is refused with an error object, and the server goes on as before."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator

import httpx
import pytest
from serving_cases import Server, eventually

JSON = {"Content-Type": "application/json"}
GOOD = b'{"model": "tiny", "prompt": "abc", "max_tokens": 1}'
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def guarded(serve: Callable[..., Server]) -> Server:
    return serve(max_tokens=50, max_prompt_tokens=20_000, body_seconds=1)


@pytest.fixture
def client(guarded: Server) -> Iterator[httpx.Client]:
    """The server is idle, healthy and without any failure of its own afterwards."""
    failures = guarded.engine.counters.failures
    with guarded.http() as client:
        yield client
        assert client.post("/v1/completions", content=GOOD, headers=JSON).status_code == 200
        assert client.get("/health").status_code == 200
    assert eventually(lambda: guarded.engine.idle)
    assert guarded.engine.counters.failures == failures, "refused before it got into the engine"


def raw(server: Server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=600)


def refused(answer: httpx.Response, status: int = 400) -> None:
    assert answer.status_code == status, (answer.status_code, answer.text[:300])
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and len(error["message"]) < 1000


@pytest.mark.parametrize(
    "field",
    [
        *('"temperature": NaN', '"temperature": Infinity', '"temperature": 1e400'),
        *('"top_p": NaN', '"min_p": NaN', '"repetition_penalty": NaN', '"repetition_penalty": 1e-320'),
        *('"top_k": 1e30', '"top_k": -2', '"seed": 9223372036854775808', '"max_tokens": -1', '"max_tokens": 1e2'),
        *('"n": 0', '"n": 128', '"n": 1e9', '"logprobs": 21', '"logprobs": -1', '"seed": ' + "9" * 5000),
        *('"stop": [""]', '"stop": "\\ud800"', '"stop": ' + json.dumps(["x"] * 17), '"stop": "' + "y" * 257 + '"'),
        *('"context": "\\ud800"', '"context": 5', '"context": "' + "x" * 81 + '"', '"save_context": {"name": "../x"}'),
        *('"save_context": {"name": "\\u0000"}', '"save_context": {"expires_in": NaN}', '"n": 2, "save_context": true'),
        *('"prompt": ""', '"prompt": []', '"prompt": [[]]', '"prompt": [-1]', '"prompt": [1.5]', '"prompt": null'),
        *('"prompt": [256]', '"prompt": [2147483648]', '"prompt": ["a", 1]', '"prompt": "\\ud800"'),
        *('"prompt": "\\u0000"', '"prompt": {"a": 1}', '"prompt": ' + json.dumps(["a"] * 2049)),
        *('"\\ud800": 1', '"a\\u0000b": 1', '"__class__": 1', '"tools": [1]', '"suffix": "x"', '"best_of": 2'),
        *('"model": 5', '"stream_options": {"x": 1}', '"logit_bias": {"256": 2}', '"ignore_end": "maybe"'),
    ],
)
def test_values(client: httpx.Client, field: str) -> None:
    body = f'{{"model": "tiny", "prompt": "abc", "max_tokens": 3, {field}}}'
    refused(client.post("/v1/completions", content=body.encode(), headers=JSON))


@pytest.mark.parametrize(
    "messages",
    [
        *("[]", "[{}]", "[1]", "null", '"x"', '[{"role": "user"}]', '[{"role": "tool"}]'),
        *('[{"role": "user", "content": null}]', '[{"role": "user", "content": []}]'),
        *('[{"role": "user", "content": "\\ud800"}]', '[{"role": "user", "content": "\\u0000"}]'),
        '[{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]',
        json.dumps([{"role": "user", "content": "x"}] * 4097),
    ],
)
def test_messages(client: httpx.Client, messages: str) -> None:
    body = f'{{"model": "tiny", "max_tokens": 2, "messages": {messages}}}'
    refused(client.post("/v1/chat/completions", content=body.encode(), headers=JSON))


def test_a_message_is_no_template(client: httpx.Client) -> None:
    messages = [{"role": "user", "content": "{{ 1/0 }}{% for x in range(10**9) %}"}]
    answer = client.post("/v1/chat/completions", json={"model": "tiny", "max_tokens": 2, "messages": messages})
    assert answer.status_code == 200 and answer.json()["usage"]["prompt_tokens"] > 40


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/contexts"])
@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"\0", b"null", b"5", b'"x"', b"[]", b"NaN", b'{"model": "tiny"} x', b'{"model": "\xff\xfe"}'),
        *(b"[" * 1_000_000, b'{"a":' * 50_000 + b"1" + b"}" * 50_000, b"9" * 10_000),
    ],
    ids=lambda body: repr(body[:12]),
)
def test_bodies(client: httpx.Client, path: str, body: bytes) -> None:
    refused(client.post(path, content=body, headers=JSON))


def test_the_last_of_two_equal_keys_counts(client: httpx.Client) -> None:
    body = b'{"model": "tiny", "prompt": "abc", "max_tokens": 1, "max_tokens": 2}'
    assert client.post("/v1/completions", content=body, headers=JSON).json()["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data; boundary=x", "application/xml", "", ";;;"])
def test_content_types(client: httpx.Client, kind: str) -> None:
    """JSON is JSON only when it is called so; a text is a text whatever it is called."""
    refused(client.post("/v1/completions", content=GOOD, headers={"Content-Type": kind}))
    made = client.post("/v1/contexts", content=GOOD, headers={"Content-Type": kind})
    if kind.startswith("multipart"):  # a form that is none
        refused(made)
    else:
        assert made.status_code == 201 and made.json()["tokens"] == len(GOOD)


@pytest.mark.parametrize(
    ("head", "body", "status"),
    [
        (b"Content-Length: " + b"9" * 5000, GOOD, 400),
        (b"Content-Length: 99999999999", GOOD, 413),
        (b"Content-Length: -5", GOOD, 400),
        (b"Content-Length: +51", GOOD, 400),
        (b"Content-Length: 10", GOOD, 400),
        (b"Content-Length: 100", GOOD, 408),
        (b"Content-Length: 51\r\nContent-Length: 52", GOOD, 400),
        (b"Transfer-Encoding: xchunked", GOOD, 400),
        (b"Transfer-Encoding: chunked", b"zz\r\n" + GOOD, 400),
        (b"Transfer-Encoding: chunked", b"ffffffffffffffff\r\n" + GOOD, 408),
        (b"Content-Length: 51\r\nX: a\0b", GOOD, 400),
        (b"Content-Length: 51\r\nX: " + b"a" * 200_000, GOOD, 400),
        (b"Content-Length: 51\r\nOrigin: http://[", GOOD, 403),
        (b"Content-Length: 51\r\nX-Odd: \xff\xfe\r\nAuthorization: Bearer \xff", GOOD, 200),
        (b"Transfer-Encoding: chunked", b"".join(b"1\r\n%c\r\n" % byte for byte in GOOD) + b"0\r\n\r\n", 200),
    ],
    ids=lambda value: repr(value[:40]) if isinstance(value, bytes) else str(value),
)
def test_lies_about_the_body(guarded: Server, client: httpx.Client, head: bytes, body: bytes, status: int) -> None:
    with raw(guarded) as connection:
        connection.sendall(POST + head + b"\r\n\r\n" + body)
        assert connection.recv(1000).startswith(f"HTTP/1.1 {status} ".encode())


@pytest.mark.parametrize(
    ("query", "status"),
    [
        *(("expires_in=nan", 400), ("expires_in=inf", 400), ("expires_in=-1", 400), ("expires_in=1e308", 400)),
        *(("name=", 400), ("name=..", 400), ("name=%ff%00", 400), ("name=a%0a", 400), ("progress=x", 400)),
    ],
)
def test_queries(client: httpx.Client, query: str, status: int) -> None:
    refused(client.post(f"/v1/contexts?{query}", content=b"abc"), status)


def test_context_files_cut_at_every_tenth(client: httpx.Client) -> None:
    client.post("/v1/contexts", json={"text": "hello " * 50, "name": "whole"})
    whole = client.get("/v1/contexts/whole/export").content
    before = client.get("/v1/contexts").json()
    heads = [length.to_bytes(8, "little") for length in (0, 1, 10**8, 2**63, 2**64 - 1, len(whole))]
    cut = [whole[: len(whole) * tenth // 10] for tenth in range(10)]
    foreign = b'{"__metadata__":{"format":"megalodon-context-1","context":"{}","checksum":"x"}}'
    for damaged in (*cut, *(head + whole[8:] for head in heads), len(foreign).to_bytes(8, "little") + foreign):
        refused(client.post("/v1/contexts/import", content=damaged))
    assert client.get("/v1/contexts").json() == before


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n",
        POST + b"Content-Length: abc\r\n\r\n{}",
        POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_no_http_has_an_error_object_too(guarded: Server, client: httpx.Client, sent: bytes) -> None:
    with raw(guarded) as connection:
        connection.sendall(sent)
        head, body = b"".join(iter(lambda: connection.recv(1000), b"")).split(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ") and b"application/json" in head
    assert json.loads(body)["error"]["code"] == "invalid_http"


def test_a_body_that_breaks_off_after_its_answer(
    guarded: Server, client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    with raw(guarded) as connection:
        connection.sendall(POST.replace(b"localhost", b"evil.example") + b"Transfer-Encoding: chunked\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}}"):
            answer += connection.recv(1000)
        assert answer.startswith(b"HTTP/1.1 403 ")
        connection.sendall(b"zz\r\n")
        assert connection.recv(1000) == b"", "the connection ends; there is nothing to say twice"
    assert "Traceback" not in caplog.text and "Fatal error" not in caplog.text


@pytest.mark.parametrize(
    "field",
    [
        *(
            '"max_tokens": true',
            '"temperature": true',
            '"top_p": true',
            '"seed": false',
            '"n": true',
            '"logprobs": true',
        ),
        *('"stop_token_ids": [true]', '"logit_bias": {"5": true}', '"save_context": {"expires_in": true}'),
        *('"frequency_penalty": false', '"repeat_penalty": true', '"min_tokens": false'),
    ],
)
def test_true_is_no_number(client: httpx.Client, field: str) -> None:
    answer = client.post("/v1/completions", content=f'{{"model": "tiny", "prompt": "a", {field}}}', headers=JSON)
    refused(answer)
    assert answer.json()["error"]["param"].startswith(field[1:].partition('"')[0])


def test_head_is_answered_as_get_without_a_body(client: httpx.Client) -> None:
    client.post("/v1/contexts", json={"text": "text", "name": "headed"})
    for path in ("/", "/health", "/v1/models", "/v1/contexts", "/v1/contexts/headed/export"):
        head, got = client.head(path), client.get(path)
        assert head.status_code == got.status_code == 200 and head.content == b""
        assert head.headers["content-type"] == got.headers["content-type"]
    assert client.head("/v1/completions").status_code == 405
