"""What an upload may look like, and what is known before its text is read: names, quotas, fields."""

from __future__ import annotations

import json
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from serving_cases import Server, eventually

TEXT = "It is a truth universally acknowledged, naïve €. " * 20
TEXT_PLAIN = {"Content-Type": "text/plain"}


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with server.http() as client:
        yield client


def error_of(answer: httpx.Response, status: int) -> dict:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


def test_the_same_text_in_every_way(client: httpx.Client) -> None:
    raw, form = TEXT.encode(), {"file": ("a.txt", TEXT.encode(), "text/plain")}
    ways = [
        client.post("/v1/contexts", content=raw, headers=TEXT_PLAIN),
        client.post(
            "/v1/contexts", content=b"\xef\xbb\xbf" + raw, headers={"Content-Type": "Text/PLAIN; Charset=UTF-8"}
        ),
        client.post("/v1/contexts", files=form),
        client.post("/v1/contexts", files={"text": ("b.md", raw, "text/markdown")}, params={"name": "by query"}),
        client.post("/v1/contexts", files=form, data={"name": "by form", "expires_in": "1000"}),
        client.post("/v1/contexts", json={"text": TEXT}),
        *(
            client.post("/v1/contexts", content=json.dumps({"text": TEXT}), headers={"Content-Type": kind})
            for kind in ("APPLICATION/JSON", "application/vnd.api+json; charset=utf-8", "Application/Ld+Json")
        ),
        client.post(
            "/v1/contexts",
            content=b"\xef\xbb\xbf" + json.dumps({"text": TEXT}).encode(),
            headers={"Content-Type": "application/json"},
        ),
    ]
    assert [answer.status_code for answer in ways] == [201] * len(ways), [answer.text for answer in ways]
    assert len({answer.json()["text"] for answer in ways}) == 1
    assert ways[3].json()["name"] == "by query" and ways[4].json()["name"] == "by form"
    assert ways[4].json()["expires_at"] is not None
    client.post("/v1/contexts", json={"text": TEXT[:500], "name": "begun"})
    extended = client.post("/v1/contexts/begun/extend", files={"file": ("a.txt", TEXT[500:].encode())})
    assert extended.json()["text"] == ways[0].json()["text"]


def test_a_form_cut_anywhere_in_transit(client: httpx.Client) -> None:
    request = client.build_request(
        "POST", "/v1/contexts", files={"file": ("a.txt", TEXT.encode())}, data={"expires_in": "9"}
    )
    body, kind = request.read(), request.headers["content-type"]
    expected = client.post("/v1/contexts", content=TEXT.encode(), headers=TEXT_PLAIN).json()["text"]
    for size in (1, 7, 64, 1000):
        parts = (body[start : start + size] for start in range(0, len(body), size))
        assert client.post("/v1/contexts", content=parts, headers={"Content-Type": kind}).json()["text"] == expected


@pytest.mark.parametrize(
    ("files", "data", "param"),
    [
        ([], {"name": "x"}, "file"),
        ([("file", ("a", b"x")), ("file", ("b", b"y"))], {}, "file"),
        ([("file", ("a", b"x"))], {"nonsense": "1"}, "nonsense"),
        ([("file", ("a", b"x"))], {"name": "../x"}, "name"),
        ([("file", ("a", b"x"))], {"expires_in": "soon"}, "expires_in"),
        ([("file", ("a", b""))], {}, "file"),
        ([("file", ("a", b"\xff\xfea\0"))], {}, "file"),
        ([("file", ("a", b"a\0b"))], {}, "file"),
    ],
)
def test_forms_that_are_refused(client: httpx.Client, files: list, data: dict, param: str) -> None:
    before = client.get("/v1/contexts", params={"limit": 1000}).json()
    answer = client.post("/v1/contexts", files=files or {"name": (None, "x")}, data=data if files else {})
    assert error_of(answer, 400)["param"] == param
    assert client.get("/v1/contexts", params={"limit": 1000}).json() == before


@pytest.mark.parametrize(
    "body", [b"", b"--x\r\n", b"--x\r\nContent-Disposition: form-data; name=file\r\n\r\nabc", b"junk"]
)
def test_forms_that_are_none(client: httpx.Client, body: bytes) -> None:
    for kind in ("multipart/form-data; boundary=x", "Multipart/Form-Data; boundary=x", "multipart/form-data"):
        error_of(client.post("/v1/contexts", content=body, headers={"Content-Type": kind}), 400)


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/v1/contexts?nam=x"), ("POST", "/v1/contexts?name=a&name=b"), ("GET", "/v1/contexts?limits=1")],
)
def test_unknown_query_keys_are_refused(client: httpx.Client, method: str, path: str) -> None:
    answer = client.request(method, path, content=b"x", headers=TEXT_PLAIN)
    assert error_of(answer, 400)["param"] == path.partition("?")[2].partition("=")[0]


def test_other_encodings_are_named(client: httpx.Client) -> None:
    for encoding in ("utf-16", "utf-16-be"):
        content = (b"\xfe\xff" if encoding == "utf-16-be" else b"") + "Hello".encode(encoding)
        answer = client.post("/v1/contexts", content=content, headers=TEXT_PLAIN)
        assert "UTF-16" in error_of(answer, 400)["message"]


def test_a_taken_name_is_refused_before_the_text_is_read(server: Server, client: httpx.Client) -> None:
    client.post("/v1/contexts", json={"text": "x", "name": "taken"})
    exported = client.get("/v1/contexts/taken/export").content
    long, read = "many words " * 20_000, server.engine.counters.read_tokens
    for answer in (
        client.post("/v1/contexts?name=taken", content=long.encode(), headers=TEXT_PLAIN),
        client.post("/v1/contexts", json={"text": long, "name": "taken"}),
        client.post("/v1/contexts", files={"name": (None, "taken"), "file": ("a", long.encode())}),
        client.post("/v1/contexts/import?name=taken", content=exported),
        client.post("/v1/contexts/taken/fork", json={"name": "taken"}),
        client.post("/v1/completions", json={"model": "tiny", "prompt": long, "save_context": {"name": "taken"}}),
    ):
        saved = answer.url.path == "/v1/completions"
        assert error_of(answer, 409)["param"] == ("save_context.name" if saved else "name")
    assert server.engine.counters.read_tokens == read


def test_a_name_is_taken_while_its_text_arrives(client: httpx.Client) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def parts() -> Iterator[bytes]:
        yield b"beginning "
        begun.set()
        go_on.wait(600)
        yield b"end"

    def upload() -> None:
        found.append(client.post("/v1/contexts?name=arriving", content=parts(), headers=TEXT_PLAIN).status_code)

    found: list[int] = []
    thread = threading.Thread(target=upload)
    thread.start()
    begun.wait(600)
    time.sleep(0.3)
    refused = client.post("/v1/contexts?name=arriving", content=b"x", headers=TEXT_PLAIN)
    go_on.set()
    thread.join()
    assert error_of(refused, 409)["code"] == "name_taken" and found == [201]


def test_quotas_hold_under_concurrent_uploads(serve: Callable[..., Server]) -> None:
    server = serve(max_contexts=3, max_uploads=8)
    start = threading.Barrier(8)

    def parts() -> Iterator[bytes]:
        yield b"beginning "
        start.wait(600)
        yield b"end"

    statuses: list[int] = []

    def upload() -> None:
        with server.http() as client:
            statuses.append(client.post("/v1/contexts", content=b"text " * 300, headers=TEXT_PLAIN).status_code)

    threads = [threading.Thread(target=upload) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [201] * 3 + [403] * 5
    with server.http() as client:
        assert len(client.get("/v1/contexts").json()["data"]) == 3
        client.delete("/v1/contexts/" + client.get("/v1/contexts").json()["data"][0]["id"])
        assert client.post("/v1/contexts", json={"text": ""}).status_code == 400, "and gives its place back"
        assert client.post("/v1/contexts", json={"text": "x"}).status_code == 201


def test_a_change_of_expiry_does_not_cost_a_running_extension(client: httpx.Client) -> None:
    client.post("/v1/contexts", json={"text": "once ", "name": "extended"})
    begun, go_on = threading.Event(), threading.Event()

    def parts() -> Iterator[bytes]:
        yield b"upon "
        begun.set()
        go_on.wait(600)
        yield b"a time"

    found: list[httpx.Response] = []
    thread = threading.Thread(
        target=lambda: found.append(client.post("/v1/contexts/extended/extend", content=parts(), headers=TEXT_PLAIN))
    )
    thread.start()
    begun.wait(600)
    time.sleep(0.3)
    changed = client.patch("/v1/contexts/extended", json={"expires_in": 500, "name": "renamed meanwhile"})
    assert changed.status_code == 200
    go_on.set()
    thread.join()
    assert found[0].status_code == 200, found[0].text
    now = client.get("/v1/contexts/renamed meanwhile").json()
    assert now["tokens"] == len("once upon a time") and now["expires_at"] is not None


def test_imports_are_bounded_before_they_are_read(client: httpx.Client) -> None:
    client.post("/v1/contexts", json={"text": TEXT, "name": "honest"})
    whole = client.get("/v1/contexts/honest/export").content
    length = struct.unpack("<Q", whole[:8])[0]
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]

    def forged(change: Callable[[dict], object], more: bytes = b"") -> bytes:
        copy = json.loads(json.dumps(header))
        change(copy)
        written = json.dumps(copy).encode()
        return struct.pack("<Q", len(written)) + written + data + more

    def inner(**fields: object) -> Callable[[dict], object]:
        def change(copy: dict) -> None:
            copy["__metadata__"]["context"] = json.dumps({**json.loads(copy["__metadata__"]["context"]), **fields})

        return change

    end = len(data)
    one = {"dtype": "F32", "shape": [1 << 22], "data_offsets": [end, end + (1 << 24)]}
    many = {f"x{i}": {"dtype": "U8", "shape": [0], "data_offsets": [end, end]} for i in range(100_000)}
    for damaged in (
        forged(lambda copy: copy.update(extra=one), bytes(1 << 24)),
        forged(lambda copy: copy.update(many)),
        forged(inner(position=2**61, tokens=2**61)),
        forged(inner(recent=[2**60])),
        struct.pack("<Q", 2**40) + whole[8:],
    ):
        began = time.process_time()
        assert "damaged" in error_of(client.post("/v1/contexts/import", content=damaged), 400)["message"]
        assert time.process_time() - began < 60
    assert eventually(lambda: client.get("/health").status_code == 200)


def test_a_store_that_can_only_be_read(
    serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from megalodon.inference import context_store, snapshot_file

    server = serve(contexts=str(tmp_path / "contexts"))
    with server.http() as client:
        client.post("/v1/contexts", json={"text": TEXT, "name": "kept"})
        answer = client.post("/v1/completions", json={"model": "tiny", "context": "kept", "seed": 1}).json()["choices"]

        def refuse(*_: object, **__: object) -> None:
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr(snapshot_file, "write_file", refuse)
        monkeypatch.setattr(context_store, "write_text", refuse)
        for refused in (
            client.post("/v1/contexts", json={"text": "x"}),
            client.post("/v1/contexts/kept/fork"),
            client.patch("/v1/contexts/kept", json={"name": "other"}),
            client.post("/v1/completions", json={"model": "tiny", "context": "kept", "save_context": True}),
        ):
            assert error_of(refused, 507)["code"] == "read_only"
        assert client.get("/v1/contexts/kept").status_code == 200
        again = client.post("/v1/completions", json={"model": "tiny", "context": "kept", "seed": 1})
        assert again.json()["choices"] == answer


def test_encoded_bodies_and_forms_for_context_files_are_refused_by_name(server: Server) -> None:
    with server.http() as client:
        for path in ("/v1/completions", "/v1/contexts"):
            answer = client.post(path, content=b"\x1f\x8b\x08", headers={"Content-Encoding": "gzip"})
            assert answer.status_code == 415 and answer.json()["error"]["param"] == "Content-Encoding"
        answer = client.post("/v1/contexts/import", files={"file": b"x"})
        assert answer.status_code == 400 and "form" in answer.json()["error"]["message"]
        for method in (client.get, client.delete):
            error = method("/v1/responses/resp_none").json()["error"]
            assert error["code"] == "response_not_found" and error["param"] == "response_id"


def test_texts_that_are_not_utf_8_by_what_is_said_of_them_are_refused_by_name(client: httpx.Client) -> None:
    latin = "Ã©".encode("latin-1")  # which is valid UTF-8, and means something else there
    before = client.get("/v1/contexts", params={"limit": 1000}).json()
    for charset in ("iso-8859-1", "utf-16le", '"windows-1252"', "klingon", ""):
        answer = client.post("/v1/contexts", content=latin, headers={"Content-Type": f"text/plain; charset={charset}"})
        assert error_of(answer, 400)["param"] == "Content-Type"
        part = ("a.txt", latin, f"text/plain; charset={charset}")
        assert error_of(client.post("/v1/contexts", files={"file": part}), 400)["param"] == "file"
    for encoding in ("base64", "Quoted-Printable"):
        part = ("a.txt", b"aGVsbG8=", "text/plain", {"Content-Transfer-Encoding": encoding})
        assert encoding.lower() in error_of(client.post("/v1/contexts", files={"file": part}), 400)["message"]
    mixed = client.post("/v1/contexts", content=b"--x--", headers={"Content-Type": "multipart/mixed; boundary=x"})
    assert "multipart/mixed" in error_of(mixed, 400)["message"]
    for mark in ("utf-32-le", "utf-32-be"):
        answer = client.post("/v1/contexts", content="\ufeffx".encode(mark), headers=TEXT_PLAIN)
        assert "UTF-32" in error_of(answer, 400)["message"]
    unnamed = b"--x\r\nContent-Type: text/plain\r\n\r\nabc\r\n--x--\r\n"
    answer = client.post("/v1/contexts", content=unnamed, headers={"Content-Type": "multipart/form-data; boundary=x"})
    assert error_of(answer, 400)["param"] == "body"
    assert client.get("/v1/contexts", params={"limit": 1000}).json() == before
    for charset in ("UTF-8", '"utf8"', "us-ascii"):
        kind = f"text/plain; charset={charset}"
        made = client.post("/v1/contexts", files={"file": ("a.txt", b"abc", kind)})
        assert made.status_code == client.post("/v1/contexts", content=b"x", headers={"Content-Type": kind}).status_code
        assert made.status_code == 201 and made.json()["tokens"] == 3
    for kind in ("text/json", "model/gltf+json"):
        assert (
            client.post("/v1/contexts", content=b'{"text": "ab"}', headers={"Content-Type": kind}).json()["tokens"] == 2
        )
    second = client.post("/v1/contexts", content=b"\xef\xbb\xbf" * 2 + b"x", headers=TEXT_PLAIN)
    assert second.json()["tokens"] == 4, "only the first is a mark"


def test_a_name_that_looks_like_an_id_is_no_name(client: httpx.Client) -> None:
    name, body = "ctx_" + "0" * 24, {"model": "tiny", "prompt": "x"}
    client.post("/v1/contexts", json={"text": "x", "name": "to rename"})
    for answer, param in (
        (client.post("/v1/contexts", params={"name": name}, content=b"x", headers=TEXT_PLAIN), "name"),
        (client.post("/v1/contexts", json={"text": "x", "name": name}), "name"),
        (client.patch("/v1/contexts/to rename", json={"name": name}), "name"),
        (client.post("/v1/completions", json={**body, "save_context": {"name": name}}), "save_context.name"),
    ):
        assert error_of(answer, 400)["param"] == param
