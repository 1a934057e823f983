"""Keys, limits and their statuses, clients that go away or read slowly, and ends in order."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from serving_cases import Server, eventually

from engine_cases import make_model
from megalodon.data import ByteTokenizer
from megalodon.serving.auth import ApiKeys
from megalodon.serving.errors import ApiError

ALICE, BOB = "alice-secret-1", "bob-secret-22"
BODY = {"model": "tiny", "prompt": "abc", "max_tokens": 3}
LONG = {"model": "tiny", "prompt": "abc", "max_tokens": 4000, "stream": True, "ignore_end": True}
TEXT_PLAIN = {"Content-Type": "text/plain"}


# --- keys -----------------------------------------------------------------------------------------------------------


def test_keys_are_required_and_separate_owners(serve: Callable[..., Server], key_file: Path) -> None:
    server = serve(key_file=key_file)
    with server.http() as nobody, server.http("alice-secret-2") as wrong:
        for client in (nobody, wrong):
            for path in ("/v1/models", "/v1/contexts", "/v1/contexts/x", "/v1/nothing"):
                answer = client.get(path)
                assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert client.post("/v1/completions", json=BODY).status_code == 401
        assert nobody.get("/health").status_code == 200
    with server.http(ALICE) as alice, server.http(BOB) as bob:
        made = alice.post("/v1/contexts", json={"text": "a secret of Alice's " * 20, "name": "mine"}).json()
        for key in (made["id"], "mine"):
            for method, path in (("GET", ""), ("PATCH", ""), ("DELETE", ""), ("GET", "/export"), ("POST", "/fork")):
                assert bob.request(method, f"/v1/contexts/{key}{path}", json={}).status_code == 404
            assert bob.post(f"/v1/contexts/{key}/extend", json={"text": "x"}).status_code == 404
            assert bob.post("/v1/completions", json={**BODY, "context": key}).status_code == 404
        assert bob.get("/v1/contexts").json()["data"] == []
        assert bob.post("/v1/contexts", json={"text": "x", "name": "mine"}).status_code == 201, "names are per key"
        assert alice.get("/v1/contexts/mine").status_code == 200
        prompt = {**BODY, "prompt": "a shared beginning " * 10}
        used = [client.post("/v1/completions", json=prompt).json()["usage"] for client in (alice, bob, bob)]
        assert [one["prompt_tokens_details"]["cached_tokens"] for one in used] == [0, 0, 176]


def test_keys_come_from_file_and_environment_and_can_be_withdrawn(
    key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "MEGALODON_API_KEYS", "from-the-environment, sha256:" + hashlib.sha256(b"hashed-one").hexdigest()
    )
    keys = ApiKeys(key_file)
    owners = {keys.owner(f"Bearer {key}") for key in (ALICE, BOB, "from-the-environment", "hashed-one")}
    assert len(owners) == 4 and not any(ALICE in owner for owner in owners)
    for header in (None, "", "Bearer", "Bearer ", f"Basic {ALICE}", f"Bearer {ALICE}x", "Bearer sha256:" + "0" * 64):
        with pytest.raises(ApiError) as refused:
            keys.owner(header)
        assert refused.value.status == 401
    key_file.write_text(f"bob = {BOB}\n")
    os.utime(key_file, ns=(1, 1))
    with pytest.raises(ApiError):
        keys.owner(f"Bearer {ALICE}")
    key_file.unlink()
    with pytest.raises(ApiError):
        keys.owner(f"Bearer {BOB}")
    assert keys.owner("Bearer from-the-environment")


def test_keys_of_any_letters(key_file: Path) -> None:
    key_file.write_text("clé-à-moi-à\nключ-ключ\n", encoding="utf-8")
    keys = ApiKeys(key_file)
    for key in ("clé-à-moi-à", "ключ-ключ"):
        assert keys.owner(f"Bearer {key}".encode().decode("latin-1")), "as servers see what clients send as UTF-8"
    with pytest.raises(ApiError):
        keys.owner("Bearer ????-????")


def test_a_spoilt_line_takes_no_other_key_away_and_leaves_none_that_is_gone(key_file: Path) -> None:
    keys = ApiKeys(key_file)
    assert keys.owner(f"Bearer {ALICE}") and keys.owner(f"Bearer {BOB}")
    key_file.write_text(f"{BOB}\nshort\n")
    os.utime(key_file, ns=(1, 1))
    for _ in range(2):
        assert keys.owner(f"Bearer {BOB}")
        for gone in (ALICE, "short"):
            with pytest.raises(ApiError):
                keys.owner(f"Bearer {gone}")
    key_file.write_bytes(b"\xff\xfe no text")
    os.utime(key_file, ns=(2, 2))
    with pytest.raises(ApiError):
        keys.owner(f"Bearer {BOB}")


@pytest.mark.parametrize("line", ["short", "has some spaces", "sha256:0123", ""])
def test_what_is_no_key_is_refused_at_the_start(tmp_path: Path, line: str) -> None:
    (tmp_path / "keys").write_text(line)
    with pytest.raises(ValueError, match="key"):
        ApiKeys(tmp_path / "keys")
    with pytest.raises(FileNotFoundError, match="no key file"):
        ApiKeys(tmp_path / "nowhere")


# --- limits ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def narrow(serve: Callable[..., Server]) -> Server:
    return serve(
        {"queue_length": 2},
        max_body=2000,
        max_upload=5000,
        max_prompt_tokens=1000,
        max_concurrent=3,
        max_contexts=2,
        request_seconds=1.5,
        body_seconds=0.5,
    )


def test_bodies_too_large(narrow: Server) -> None:
    with narrow.http() as client:
        for content in (b'{"model": "' + b"x" * 3000, iter([b'{"model": "', b"x" * 3000])):
            answer = client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
            assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"
        for path in ("/v1/contexts", "/v1/contexts/import"):
            for content in (b"x" * 6000, iter([b"x" * 3000] * 2)):
                assert client.post(path, content=content, headers=TEXT_PLAIN).status_code == 413
        assert client.get("/v1/contexts").json()["data"] == []


def test_prompts_too_long(narrow: Server) -> None:
    with narrow.http() as client:
        for stream in (False, True):
            answer = client.post("/v1/completions", json={**BODY, "prompt": "x" * 1001, "stream": stream})
            assert answer.status_code == 413 and answer.json()["error"]["code"] == "prompt_too_long"
        assert client.post("/v1/contexts", content=b"x" * 1001, headers=TEXT_PLAIN).status_code == 413


def test_too_many_contexts(narrow: Server) -> None:
    with narrow.http() as client:
        made = [client.post("/v1/contexts", json={"text": "x"}).json()["id"] for _ in range(2)]
        for answer in (
            client.post("/v1/contexts", json={"text": "x"}),
            client.post(f"/v1/contexts/{made[0]}/fork", json={}),
            client.post("/v1/completions", json={**BODY, "save_context": True}),
        ):
            assert answer.status_code == 403 and answer.json()["error"]["code"] == "too_many_contexts"
        for one in made:
            client.delete(f"/v1/contexts/{one}")


def test_time_limit_of_a_request(narrow: Server) -> None:
    with narrow.http() as client:
        answer = client.post("/v1/completions", json={**LONG, "max_tokens": 8000, "n": 8, "stream": False})
        assert answer.status_code == 408 and answer.json()["error"]["code"] == "timeout"
        with client.stream("POST", "/v1/completions", json={**LONG, "max_tokens": 8000, "n": 8}) as stream:
            lines = [line for line in stream.iter_lines() if line]
        assert stream.status_code == 200 and '"code": "timeout"' in lines[-1]
    assert eventually(lambda: narrow.engine.idle)


def test_a_body_that_stops_arriving(narrow: Server) -> None:
    host, port = narrow.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"POST /v1/contexts HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nabc")
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")
    assert eventually(lambda: narrow.engine.idle)


def test_too_many_requests_of_a_key_and_a_full_queue(serve: Callable[..., Server]) -> None:
    server = serve({"queue_length": 1}, max_concurrent=18)
    with server.http() as client:
        streams = [client.stream("POST", "/v1/completions", json=LONG) for _ in range(16)]
        for stream in streams:
            stream.__enter__()
        assert eventually(lambda: server.engine.counters.generating == 16)
        waiting = client.stream("POST", "/v1/completions", json=LONG)
        thread = threading.Thread(target=lambda: waiting.__enter__(), daemon=True)
        thread.start()
        assert eventually(lambda: server.engine.waiting == 1)
        full = client.post("/v1/completions", json=BODY)
        assert full.status_code == 503 and int(full.headers["retry-after"]) >= 1
        assert full.json()["error"]["code"] == "overloaded"
        for stream in streams:
            stream.__exit__(None, None, None)
        thread.join(20)
        waiting.__exit__(None, None, None)
    assert eventually(lambda: server.engine.idle)
    server.settings.max_concurrent = 1
    with server.http() as client, client.stream("POST", "/v1/completions", json=LONG):
        refused = client.post("/v1/completions", json=BODY)
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
    assert eventually(lambda: server.engine.idle)


def test_one_key_cannot_take_all_upload_threads(serve: Callable[..., Server], key_file: Path) -> None:
    server = serve(key_file=key_file, max_uploads=2)
    host, port = server.url.removeprefix("http://").split(":")
    keyed = f"Host: localhost\r\nAuthorization: Bearer {ALICE}\r\n"
    head = f"POST /v1/contexts HTTP/1.1\r\n{keyed}Content-Length: 100\r\n\r\nabc"
    stalled = [socket.create_connection((host, int(port))) for _ in range(2)]
    try:
        for connection in stalled:
            connection.sendall(head.encode())
        assert eventually(lambda: server.engine.counters.reading == 2)
        with server.http(ALICE) as alice, server.http(BOB) as bob:
            refused = alice.post("/v1/contexts", content=b"text", headers=TEXT_PLAIN)
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["code"] == "too_many_requests"
            assert 'megalodon_refused_total{limit="uploads"} 1.0' in bob.get("/metrics").text
            assert bob.post("/v1/contexts", content=b"text", headers=TEXT_PLAIN).status_code == 201
    finally:
        for connection in stalled:
            connection.close()
    assert eventually(lambda: server.engine.idle)
    with server.http(ALICE) as alice:
        assert alice.post("/v1/contexts", content=b"text", headers=TEXT_PLAIN).status_code == 201


def test_pages_of_other_sites_are_refused(server: Server) -> None:
    with server.http() as client:
        own = server.url.removeprefix("http://")
        evil = [(origin, 403) for origin in ("http://evil.example", "null", "http://[", "")]
        for origin, status in ((f"http://{own}", 200), *evil):
            assert client.get("/v1/models", headers={"Origin": origin}).status_code == status
        sent = client.post("/v1/contexts", content=b"x", headers={**TEXT_PLAIN, "Origin": "http://evil.example"})
        assert sent.status_code == 403 and sent.json()["error"]["code"] == "cross_origin"


# --- clients --------------------------------------------------------------------------------------------------------


def test_a_client_that_goes_away_frees_its_slot(serve: Callable[..., Server]) -> None:
    server = serve(max_tokens=1_000_000)
    endless = {**LONG, "max_tokens": 1_000_000}  # it cannot end by itself while the test looks
    with server.http() as client:
        with client.stream("POST", "/v1/completions", json=endless) as stream:
            lines = stream.iter_lines()  # httpx hangs up when this is forgotten, not only at the end of the block
            next(lines)
            assert eventually(lambda: server.engine.counters.generating == 1)
            before = server.engine.counters.generated_tokens
            assert eventually(lambda: server.engine.counters.generated_tokens > before + 20)
        assert eventually(lambda: server.engine.idle)
    with server.http() as client, pytest.raises(httpx.ReadTimeout):
        client.post("/v1/completions", json={**endless, "stream": False}, timeout=0.3)
    assert eventually(lambda: server.engine.idle)


def test_a_client_that_goes_away_while_it_waits_leaves_the_queue(serve: Callable[..., Server]) -> None:
    server = serve({"slots": 16, "queue_length": 1}, max_tokens=1_000_000)
    endless = {**LONG, "max_tokens": 1_000_000, "n": 16}
    with server.http() as client, client.stream("POST", "/v1/completions", json=endless):
        assert eventually(lambda: server.engine.counters.generating == 16)
        for stream in (True, False):
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json={**BODY, "stream": stream}, timeout=0.3)
            assert eventually(lambda: server.engine.waiting == 0, 10)
        assert server.engine.counters.generating == 16
    assert eventually(lambda: server.engine.idle)


def test_a_client_that_goes_away_while_sending_leaves_nothing(server: Server) -> None:
    def parts() -> Iterator[bytes]:
        yield b"some text " * 100
        raise ConnectionError

    with server.http() as client:
        before = client.get("/v1/contexts").json()
        with pytest.raises(ConnectionError):
            client.post("/v1/contexts", content=parts(), headers=TEXT_PLAIN)
        assert eventually(lambda: server.engine.idle)
        assert client.get("/v1/contexts").json() == before


@pytest.mark.parametrize("kind", ["text/plain", "application/json", "multipart/form-data; boundary=x"])
def test_a_client_that_goes_away_when_all_is_sent_leaves_nothing(server: Server, kind: str) -> None:
    """What the page's button to stop reading does: the text is there, and takes long to be read."""
    text = "some text " * 6000  # of which the server holds all before a tenth is read
    part = 'Content-Disposition: form-data; name="file"'
    body = {
        "text/plain": text,
        "application/json": f'{{"text": "{text}"}}',
        "multipart/form-data; boundary=x": f"--x\r\n{part}\r\n\r\n{text}\r\n--x--\r\n",
    }[kind]
    host, port = server.url.removeprefix("http://").split(":")
    head = (
        f"POST /v1/contexts HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with server.http() as client:
        before, read = client.get("/v1/contexts").json(), server.engine.counters.read_tokens
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall((head + body).encode())
            assert eventually(lambda: server.engine.counters.read_tokens > read)
        assert eventually(lambda: server.engine.idle, 60)
        assert server.engine.counters.read_tokens < read + len(text), "not read to its end for nobody"
        assert client.get("/v1/contexts").json() == before


def test_a_slow_reader_blocks_nobody(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    body = b'{"model": "tiny", "prompt": "abc", "max_tokens": 1500, "stream": true, "ignore_end": true}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect((host, int(port)))
        slow.sendall(head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert eventually(lambda: server.engine.counters.generating == 1)
        with server.http() as client:
            for _ in range(3):
                assert client.post("/v1/completions", json=BODY).status_code == 200
        assert eventually(lambda: server.engine.idle, 60), "the answer is complete though nobody reads it"


# --- ends -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    make_model().save_pretrained(folder)
    ByteTokenizer().save(folder)
    return folder


class Process:
    """`megalodon serve` in a process of its own."""

    def __init__(self, folder: Path, contexts: Path) -> None:
        command = [sys.executable, "-m", "megalodon", "serve", str(folder), "--port", "0", "--contexts", str(contexts)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*command, "--slots", "4", "--drain-seconds", "600"], stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert " at http://" in line, line
        self.client = httpx.Client(base_url=line.split(" at ")[1].split("/ ")[0], timeout=600)
        assert eventually(self._ready)

    def _ready(self) -> bool:
        try:
            return self.client.get("/ready").status_code == 200
        except httpx.ConnectError:
            return False

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.client.close()


def test_sigterm_lets_running_requests_finish(folder: Path, tmp_path: Path) -> None:
    with Process(folder, tmp_path) as server:
        body = {**LONG, "max_tokens": 1000}
        with server.client.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            with httpx.Client(base_url=server.client.base_url) as late:  # a new connection, which is answered
                assert eventually(lambda: late.post("/v1/completions", json=BODY).status_code == 503)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and '"finish_reason": "length"' in rest[-2]
        assert server.process.wait(600) in (0, -signal.SIGTERM)


def test_a_crash_loses_no_saved_context_and_leaves_no_half_one(folder: Path, tmp_path: Path) -> None:
    with Process(folder, tmp_path) as server:
        kept = server.client.post("/v1/contexts", json={"text": "to be kept " * 100, "name": "kept"}).json()
        answer = server.client.post("/v1/completions", json={**BODY, "context": "kept", "seed": 1}).json()

        def keep_saving() -> None:
            for i in range(1000):
                try:
                    server.client.post("/v1/contexts", json={"text": f"{i} " * 50})
                    server.client.post(
                        "/v1/completions", json={**BODY, "context": "kept", "save_context": {"replace": False}}
                    )
                except httpx.HTTPError:
                    return

        threads = [threading.Thread(target=keep_saving) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.7)
        server.process.kill()
        for thread in threads:
            thread.join()
    with Process(folder, tmp_path) as server:
        listed = server.client.get("/v1/contexts", params={"limit": 1000}).json()["data"]
        assert len(listed) > 3 and kept["id"] in [one["id"] for one in listed]
        for one in listed:
            assert server.client.get(f"/v1/contexts/{one['id']}/export").status_code == 200
            again = server.client.post("/v1/completions", json={**BODY, "context": one["id"], "seed": 1})
            assert again.status_code == 200
        again = server.client.post("/v1/completions", json={**BODY, "context": "kept", "seed": 1}).json()
        assert again["choices"] == answer["choices"]
