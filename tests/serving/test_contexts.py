"""Contexts over HTTP: made from streams, gone on from, extended, forked, renamed, exported, imported, expired."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from serving_cases import Server, eventually

from megalodon.inference import Context, Sampling, Session

TEXT = "".join(random.Random(0).choices("abcdefghij klmnop\n", k=3000)) + "naïve €"
TEXT_PLAIN = {"Content-Type": "text/plain"}
BODY = {"model": "tiny", "max_tokens": 12, "seed": 1, "logprobs": 0, "ignore_end": True}


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with server.http() as client:
        yield client


def make(client: httpx.Client, text: str = TEXT, **parameters: object) -> dict:
    answer = client.post("/v1/contexts", content=text.encode(), headers=TEXT_PLAIN, params=parameters)
    assert answer.status_code == 201, answer.text
    return answer.json()


def complete(client: httpx.Client, **body: object) -> dict:
    answer = client.post("/v1/completions", json={**BODY, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def outcome(answer: dict) -> tuple:
    choice = answer["choices"][0]
    return choice["text"], choice["logprobs"]["token_logprobs"]


def test_going_on_equals_sending_the_whole_text(client: httpx.Client) -> None:
    context = make(client, TEXT)
    assert context["tokens"] == len(TEXT.encode()) and context["object"] == "context" and context["bytes"] > 0
    from_context = complete(client, context=context["id"], prompt=" and so")
    whole = complete(client, prompt=TEXT + " and so")
    assert outcome(from_context) == outcome(whole)
    assert from_context["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"]
    assert from_context["usage"]["prompt_tokens_details"]["cached_tokens"] > 2900
    assert outcome(complete(client, context=context["id"])) == outcome(complete(client, prompt=TEXT))


def test_a_stream_in_any_parts_is_the_same_text(client: httpx.Client) -> None:
    raw, rng = TEXT.encode(), random.Random(1)
    cuts = [*sorted(rng.sample(range(len(raw)), 60)), len(raw)]
    parts = (raw[start:end] for start, end in zip([0, *cuts], cuts, strict=False))
    answer = client.post("/v1/contexts", content=parts, headers=TEXT_PLAIN)
    as_json = client.post("/v1/contexts", json={"text": TEXT, "name": "as json"})
    assert answer.json()["text"] == make(client)["text"] == as_json.json()["text"]
    assert client.get("/v1/contexts/as json").json()["id"] == as_json.json()["id"]


def test_a_saved_answer_goes_on_as_if_it_had_not_stopped(client: httpx.Client) -> None:
    whole = complete(client, prompt=TEXT, max_tokens=50)
    first = complete(client, prompt=TEXT, max_tokens=21, save_context={"name": "after 21"})
    assert first["context"]["tokens"] == len(TEXT.encode()) + 21
    second = complete(client, context="after 21", max_tokens=29, seed=None, resume_generator=True)
    assert outcome(first)[1] + outcome(second)[1] == outcome(whole)[1]
    assert first["choices"][0]["text"] + second["choices"][0]["text"] == whole["choices"][0]["text"]


def test_replace_keeps_one_context_through_a_conversation(client: httpx.Client) -> None:
    context = make(client, "Once upon a time", name="story")
    before = len(client.get("/v1/contexts").json()["data"])
    for turn in range(3):
        answer = complete(client, context="story", prompt=f" turn {turn}", save_context={"replace": True})
        assert answer["context"]["id"] == context["id"]
    assert client.get("/v1/contexts/story").json()["tokens"] == len("Once upon a time") + 3 * (len(" turn 0") + 12)
    assert len(client.get("/v1/contexts").json()["data"]) == before


def test_streamed_answers_bring_their_context(client: httpx.Client) -> None:
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 4, "stream": True, "save_context": True}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert '"context": {"id": "ctx_' in lines[-2] and lines[-1] == "data: [DONE]"


def test_chat_goes_on_from_a_context(client: httpx.Client) -> None:
    make(client, "user: My name is Ada.\nassistant: Hello, Ada.", name="ada")
    body = {"model": "tiny", "context": "ada", "messages": [{"role": "user", "content": "Who am I?"}], "max_tokens": 5}
    chat = client.post("/v1/chat/completions", json={**body, "seed": 1}).json()
    text = "user: My name is Ada.\nassistant: Hello, Ada.\nuser: Who am I?\nassistant:"
    plain = complete(client, prompt=text, max_tokens=5, stop=["\nuser:", "\nsystem:"])
    assert chat["choices"][0]["message"]["content"] == plain["choices"][0]["text"]


def test_extend_and_fork(client: httpx.Client) -> None:
    context = make(client, TEXT[:1000], name="base")
    fork = client.post(f"/v1/contexts/{context['id']}/fork", json={"name": "fork"})
    assert fork.status_code == 201 and fork.json()["parent"] == context["id"]
    extended = client.post("/v1/contexts/fork/extend", content=TEXT[1000:].encode(), headers=TEXT_PLAIN)
    assert extended.status_code == 200 and extended.json()["id"] == fork.json()["id"]
    assert extended.json()["text"] == make(client)["text"]
    assert client.get("/v1/contexts/base").json()["tokens"] == 1000
    assert outcome(complete(client, context="fork")) == outcome(complete(client, prompt=TEXT))


def test_list_rename_expire_delete(client: httpx.Client) -> None:
    made = [make(client, f"text {i}", name=f"list {i}")["id"] for i in range(3)]
    listed = client.get("/v1/contexts", params={"limit": 2}).json()
    assert [one["id"] for one in listed["data"]] == made[:0:-1] and listed["has_more"]
    assert client.get("/v1/contexts", params={"limit": 1, "after": made[1]}).json()["data"][0]["id"] == made[0]
    assert client.post("/v1/contexts", json={"text": "x", "name": "list 1"}).status_code == 409
    assert client.patch("/v1/contexts/list 0", json={"name": "list 1"}).status_code == 409
    renamed = client.patch("/v1/contexts/list 0", json={"name": "renamed", "expires_in": 1000}).json()
    assert renamed["name"] == "renamed" and renamed["expires_at"] - time.time() == pytest.approx(1000, abs=5)
    assert client.patch("/v1/contexts/renamed", json={"expires_in": None}).json()["expires_at"] is None
    assert client.delete(f"/v1/contexts/{made[1]}").json()["deleted"]
    assert client.get(f"/v1/contexts/{made[1]}").status_code == 404
    assert client.get("/v1/contexts", params={"after": made[1]}).status_code == 404
    short = make(client, "soon gone", expires_in=0.3)
    assert eventually(lambda: client.get(f"/v1/contexts/{short['id']}").status_code == 404)


def test_export_and_import(client: httpx.Client, serve: Callable[..., Server]) -> None:
    context = make(client)
    exported = client.get(f"/v1/contexts/{context['id']}/export")
    assert exported.headers["content-length"] == str(context["bytes"]) == str(len(exported.content))
    other = serve()
    with other.http() as elsewhere:
        imported = elsewhere.post("/v1/contexts/import", content=exported.content, params={"name": "moved"})
        assert imported.status_code == 201 and imported.json()["text"] == context["text"]
        assert outcome(complete(elsewhere, context="moved")) == outcome(complete(client, prompt=TEXT))
        for damaged in (b"", b"x" * 100, exported.content[:-1], exported.content.replace(b'"tokens', b'"tokenz')):
            refused = elsewhere.post("/v1/contexts/import", content=damaged)
            assert refused.status_code == 400 and "damaged" in refused.json()["error"]["message"]
        assert len(elsewhere.get("/v1/contexts").json()["data"]) == 1


def test_files_pass_between_the_command_line_and_the_server(
    client: httpx.Client, server: Server, tmp_path: Path
) -> None:
    """What `megalodon generate --save-context` writes is imported, and what the server exports is gone on from."""
    model, path = server.engine.model, tmp_path / "saved.context"
    session = Session(model, seed=1)
    session.read(list(TEXT.encode()))
    spoken = bytes(session.generate(21, Sampling(0))).decode(errors="replace")
    session.context.save(path, model, server.engine.tokenizer)
    imported = client.post("/v1/contexts/import", content=path.read_bytes(), params={"name": "from a file"})
    assert imported.status_code == 201 and imported.json()["text"] is None
    assert imported.json()["tokens"] == len(TEXT.encode()) + 21
    greedy = {"temperature": 0, "max_tokens": 30}
    answer = complete(client, context="from a file", prompt=" and so", **greedy)
    session.read(list(b" and so"))
    expected = bytes(session.generate(30, Sampling(0))).decode(errors="replace")
    assert answer["choices"][0]["text"] == expected != spoken
    saved = complete(client, context="from a file", prompt=" and so", save_context={"name": "back"}, **greedy)
    path.write_bytes(client.get("/v1/contexts/back/export").content)
    resumed = Session(model, Context.load(path, model, server.engine.tokenizer))
    assert resumed.tokens == session.tokens == saved["context"]["tokens"]
    assert list(resumed.generate(20, Sampling(0))) == list(session.generate(20, Sampling(0)))


def test_a_context_may_be_called_progress(client: httpx.Client) -> None:
    context = make(client, "some text", name="progress")
    assert len(client.get("/v1/contexts/progress/export").content) == context["bytes"]
    client.delete("/v1/contexts/progress")
    assert client.get("/v1/contexts/progress/export").status_code == 404


def test_progress_is_told_while_a_text_is_read(client: httpx.Client) -> None:
    seen: list[tuple[int, int]] = []
    arriving = threading.Event()

    def parts() -> Iterator[bytes]:
        for i in range(20):
            yield f"{i} ".encode() * 100
            arriving.set()
            time.sleep(0.01)

    def upload() -> None:
        client.post("/v1/contexts", content=parts(), headers=TEXT_PLAIN, params={"progress": "follow-me-1"})

    thread = threading.Thread(target=upload)
    thread.start()
    arriving.wait()
    while thread.is_alive():
        now = client.get("/v1/contexts/progress/follow-me-1").json()
        seen.append((now["read"], now["arrived"]))
    thread.join()
    assert seen == sorted(seen) and len(set(seen)) > 3


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        (b"", "text/plain", "empty"),
        (b"a\0b", "text/plain", "binary"),
        (b"abc\xff", "text/plain", "not UTF-8"),
        ("€".encode()[:2], "text/plain", "not UTF-8"),
        (b"{", "application/json", "not JSON"),
        (b"{}", "application/json", "text: Field required"),
        (b'{"text": "a\\u0000"}', "application/json", "NUL"),
        (b'{"text": "\\ud800"}', "application/json", ""),
    ],
)
def test_what_is_no_text_is_refused_and_leaves_nothing(
    client: httpx.Client, server: Server, body: bytes, kind: str, message: str
) -> None:
    before = client.get("/v1/contexts").json()
    answer = client.post("/v1/contexts", content=body, headers={"Content-Type": kind})
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]
    assert client.get("/v1/contexts").json() == before
    assert eventually(lambda: server.engine.idle)


def test_ids_and_names_reach_no_other_file(client: httpx.Client) -> None:
    for key in ("..", "%2e%2e", "..%2f..%2fetc%2fpasswd", "ctx_" + "0" * 24, "ctx_zz", "a\0b", "%00", "x" * 500, "*"):
        for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/export"), ("POST", "/fork")):
            answer = client.request(method, f"/v1/contexts/{key}{path}".replace("\0", "%00"), json={})
            assert answer.status_code in (404, 405), (key, method, path, answer.text)
    for name in ("../x", "/etc/x", "ctx_" + "0" * 24, "", ".", "x" * 65, "a/b", "a\nb"):
        answer = client.post("/v1/contexts", content=b"text", headers=TEXT_PLAIN, params={"name": name})
        assert answer.status_code == 400, name


def test_an_import_lies_beside_the_contexts_while_it_arrives(client: httpx.Client, server: Server) -> None:
    scratch = Path(server.settings.contexts) / ".scratch"
    seen: list[int] = []

    def parts() -> Iterator[bytes]:
        yield b"x" * 1000
        assert eventually(lambda: scratch.is_dir() and any(scratch.iterdir()))
        seen.append(len(list(scratch.iterdir())))
        yield b"y"

    assert client.post("/v1/contexts/import", content=parts()).status_code == 400
    assert seen == [1] and not list(scratch.iterdir())
