"""Who is let in: hosts, origins, and nobody new while the server ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from serving_cases import Server, eventually

from megalodon.serving.gate import is_loopback

BODY = {"model": "tiny", "prompt": "abc", "max_tokens": 3}


def status(client: httpx.Client, path: str = "/v1/models", method: str = "GET", **headers: str) -> int:
    return client.request(method, path, headers=headers).status_code


def test_only_loopback_names_on_a_loopback_address_without_keys(server: Server) -> None:
    with server.http() as client:
        for host in (
            "evil.example",
            "evil.example:8000",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
            "x",
            "10.0.0.1",
        ):
            for path in ("/v1/models", "/", "/tokenize", "/openapi.json"):
                answer = client.get(path, headers={"Host": host})
                assert answer.status_code == 403 and answer.json()["error"]["code"] == "host_not_allowed"
            assert status(client, "/health", Host=host) == 200
        for host in ("localhost", "LOCALHOST:1", "127.0.0.1:8000", "127.9.9.9", "[::1]:80", "[::1]", "a.localhost"):
            assert status(client, Host=host) == 200, host


def test_hosts_can_be_allowed_and_keys_are_enough(serve: Callable[..., Server], key_file: Path) -> None:
    with serve(allowed_hosts=("books.example", "::1")).http() as client:
        for host, right in (("books.example", 200), ("Books.Example:443", 200), ("[::1]:8", 200), ("localhost", 403)):
            assert status(client, Host=host) == right, host
    with serve(allowed_hosts=("*",)).http() as client:
        assert status(client, Host="anything") == 200
    with serve(key_file=key_file).http("alice-secret-1") as client:
        assert status(client, Host="anything") == 200, "a page that is led here has no key"


@pytest.mark.parametrize(("name", "right"), [("::1%lo", True), ("0.0.0.0", False), ("", False), ("127.1", False)])
def test_loopback_names(name: str, right: bool) -> None:
    assert is_loopback(name) is right


def test_origins_can_be_allowed(serve: Callable[..., Server]) -> None:
    site = "https://books.example"
    with serve(allowed_origins=(site,)).http() as client:
        answer = client.post("/v1/completions", json=BODY, headers={"Origin": site})
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == site
        asked = {
            "Origin": site,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization",
        }
        preflight = client.options("/v1/completions", headers=asked)
        assert preflight.status_code == 200 and "authorization" in preflight.headers["access-control-allow-headers"]
        evil = client.post("/v1/completions", json=BODY, headers={"Origin": "https://evil.example"})
        assert evil.status_code == 403 and "access-control-allow-origin" not in evil.headers
        assert client.options("/v1/completions", headers={**asked, "Origin": "https://evil.example"}).status_code == 400
    with serve(allowed_origins=("*",)).http() as client:
        assert status(client, Origin="https://any.example") == 200


def test_nobody_new_while_the_server_ends(serve: Callable[..., Server]) -> None:
    server = serve()
    body = {**BODY, "max_tokens": 300, "stream": True, "ignore_eos": True}
    with server.http() as client, server.http() as other:
        with client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.drain.begun = True
            refused = other.post("/v1/completions", json=BODY)
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "stopping"
            assert int(refused.headers["retry-after"]) >= 1
            assert other.get("/ready").status_code == 503 and other.get("/health").status_code == 200
            assert eventually(lambda: server.drain.running == 1)  # the refused ones are leaving
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert eventually(lambda: server.drain.running == 0)
        server.drain.begun = False
        assert other.post("/v1/completions", json=BODY).status_code == 200
