"""Two replicas on Ray Serve: requests meet their text again, and one may die under load."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from engine_cases import make_model
from megalodon.data import ByteTokenizer

pytest.importorskip("ray", reason="needs the extra `ray`")
from megalodon.serving.replicas import Front, affinity


def test_affinity_is_of_context_or_beginning() -> None:
    def of(**body: object) -> str:
        return affinity("/v1/completions", "Bearer a", json.dumps(body).encode())

    long = "x" * 600
    assert of(prompt=long + "a") == of(prompt=long + "b") != of(prompt="y" + long)
    assert of(context="c", prompt="a") == of(context="c", prompt="b") != of(context="d", prompt="a")
    assert of(context="c", prompt="a") == affinity("/v1/contexts/c/extend", "Bearer a", b"")
    assert of(prompt="a") != affinity("/v1/completions", "Bearer b", json.dumps({"prompt": "a"}).encode())
    for body in (b"", b"{", b"[" * 10_000, b"\xff", b"{" * 100_000):
        assert affinity("/v1/completions", "", body)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("replicas")
    make_model().save_pretrained(folder / "tiny")
    ByteTokenizer().save(folder / "tiny")
    command = [sys.executable, "-m", "megalodon", "serve", str(folder / "tiny"), "--port", "0", "--slots", "8"]
    command += ["--contexts", str(folder / "contexts"), "--ray", "--replicas", "2", "--max-concurrent", "1000"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "RAY_DISABLE_DOCKER_CPU_WARNING": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    line = next(line for line in process.stdout if " at http://" in line)
    with httpx.Client(base_url=line.split(" at ")[1].split("/ ")[0], timeout=600) as client:
        yield client
    process.send_signal(signal.SIGTERM)
    assert process.wait(600) == 0


def complete(client: httpx.Client, **body: object) -> httpx.Response:
    return client.post("/v1/completions", json={"model": "tiny", "max_tokens": 10, "seed": 1, **body})


@pytest.mark.slow
def test_a_text_is_met_again_by_the_replica_that_knows_it(client: httpx.Client) -> None:
    homes: dict[int, str] = {}
    for turn in range(4):
        for i in range(8):
            answer = complete(client, prompt=f"text number {i} " * 60)
            assert answer.status_code == 200
            assert homes.setdefault(i, answer.headers["x-replica"]) == answer.headers["x-replica"]
            cached = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert (cached > 0) == (turn > 0)
    assert len(set(homes.values())) == 2


@pytest.mark.slow
def test_one_replica_killed_under_load(client: httpx.Client) -> None:
    context = client.post("/v1/contexts", content=b"what was read " * 500, params={"name": "kept"}).json()
    expected = {i: complete(client, prompt=f"prompt {i}", max_tokens=200).json()["choices"] for i in range(12)}
    from_context = complete(client, context="kept").json()["choices"]
    answers: list[tuple[int, httpx.Response]] = []
    streams: list[str] = []

    def ask(i: int) -> None:
        answers.append((i, complete(client, prompt=f"prompt {i}", max_tokens=200)))

    def stream(i: int) -> None:
        body = {"model": "tiny", "prompt": f"prompt {i}", "max_tokens": 200, "seed": 1, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            streams.append([line for line in answer.iter_lines() if line][-1])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(12) for work in (ask, stream)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    victim = int(client.get("/health").headers["x-replica"])
    os.kill(victim, signal.SIGKILL)
    for thread in threads:
        thread.join(120)
    assert len(answers) == 12 and len(streams) == 12
    for i, answer in answers:
        assert answer.status_code == 200 and answer.json()["choices"] == expected[i], "sent again, and the same"
    assert all(line == "data: [DONE]" or '"code": "replica_lost"' in line for line in streams)
    assert client.get("/v1/contexts/kept").json()["text"] == context["text"]
    assert complete(client, context="kept").json()["choices"] == from_context
    found = set()
    for i in range(200):
        found.add(complete(client, prompt=f"afterwards {i}").headers["x-replica"])
        if len(found) == 2:
            break
        time.sleep(0.2)
    assert len(found) == 2 and str(victim) not in found, "the lost replica is replaced"


def test_replicas_out_of_range() -> None:
    command = [sys.executable, "-m", "megalodon", "serve", str(Path("nowhere")), "--ray", "--replicas", "0"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 2


def test_the_front_waits_for_no_body_that_stops_arriving() -> None:
    sent: list[dict] = []

    async def receive() -> dict:
        await asyncio.sleep(60)
        raise AssertionError("it should have been given up")

    async def send(message: dict) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
    asyncio.run(Front(None, 0.05).app(scope, receive, send))
    assert sent[0]["status"] == 408 and b"body_timeout" in sent[1]["body"]
