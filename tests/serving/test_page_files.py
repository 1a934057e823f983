"""What the page is made of: files for everybody, which refer to each other and ask nothing of others."""

from __future__ import annotations

import re
from collections.abc import Callable

import httpx
import pytest
from serving_cases import Server

from engine_cases import make_model
from megalodon.serving.completions import kv_cache_bytes
from megalodon.serving.page import STATIC

FILES = sorted(path.name for path in STATIC.iterdir())


@pytest.fixture(scope="module")
def client(serve: Callable[..., Server]) -> httpx.Client:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("MEGALODON_API_KEYS", "page-files-secret")
        return serve().http()


@pytest.mark.parametrize("name", ["", *FILES])
def test_a_file_needs_no_key_and_runs_nothing_of_others(client: httpx.Client, name: str) -> None:
    answer = client.get(f"/static/{name}" if name else "/")
    assert answer.status_code == 200
    assert answer.headers["content-type"].split(";")[0] in ("text/html", "text/css", "text/javascript")
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "http" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    addresses = set(re.findall(r"https?://[^\s\"'`)]+", answer.text))
    assert addresses <= {"http://www.w3.org/2000/svg"}, "the name of a format, which is never loaded"


def test_files_refer_to_files_that_there_are() -> None:
    for name in FILES:
        text = (STATIC / name).read_text()
        for other in re.findall(r'(?:from "\./|="static/)([^"]+)"', text):
            assert other in FILES, f"{name} asks for {other}"


@pytest.mark.parametrize("name", ["nothing.js", "..%2fpage.py", "%2e%2e%2fpage.py", "__init__.py", "x" * 300])
def test_nothing_else_is_served(client: httpx.Client, name: str) -> None:
    answer = client.get(f"/static/{name}", headers={"Authorization": "Bearer page-files-secret"})
    assert answer.status_code == 404 and "error" in answer.json()


def test_everything_else_needs_the_key(client: httpx.Client) -> None:
    assert client.get("/v1/models").status_code == 401 == client.get("/staticx").status_code


def test_the_cache_to_compare_with_is_that_of_a_transformer_of_this_size(server: Server) -> None:
    with server.http() as client:
        told = client.get("/v1/models").json()["data"][0]["kv_cache_bytes_per_token"]
    layers, width = 2, 32
    assert told == kv_cache_bytes(make_model().config) == layers * (width + width) * 2
