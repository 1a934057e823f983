"""A full disk: 507 for what would be kept, everything else goes on, nothing is left behind, and space is used again."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors import SafetensorError
from serving_cases import Server

import megalodon.files

BODY = {"model": "tiny", "prompt": "abc", "max_tokens": 3, "seed": 1}
TEXT_PLAIN = {"Content-Type": "text/plain"}


class Disk:
    """Where contexts lie; `fill` leaves no room on it, `free` takes that back."""

    folder: Path

    def fill(self) -> None: ...

    def free(self) -> None: ...


class SmallDisk(Disk):
    """A real file system of 256 KiB."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        options = ["-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(["mount", *options], capture_output=True, check=False).returncode:
            pytest.skip("needs the right to mount a file system")

    def fill(self) -> None:
        with (self.folder / "filler").open("wb", buffering=0) as file, pytest.raises(OSError) as full:
            while True:
                file.write(bytes(4096))
        assert full.value.errno == errno.ENOSPC

    def free(self) -> None:
        (self.folder / "filler").unlink()


class FailingDisk(Disk):
    """Writes fail, with the error as safetensors has it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._monkeypatch, self._save = folder, monkeypatch, megalodon.files.save_file

    def fill(self) -> None:
        def fail(*_: object, **__: object) -> None:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

        self._monkeypatch.setattr(megalodon.files, "save_file", fail)

    def free(self) -> None:
        self._monkeypatch.setattr(megalodon.files, "save_file", self._save)


@pytest.fixture(params=["small", "failing"])
def disk(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    made = SmallDisk(tmp_path) if request.param == "small" else FailingDisk(tmp_path, monkeypatch)
    yield made
    if request.param == "small":
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def files(server: Server) -> list[Path]:
    return sorted(path for path in Path(server.settings.contexts).rglob("*") if path.is_file())


def test_a_full_disk(serve: Callable[..., Server], disk: Disk) -> None:
    server = serve(contexts=str(disk.folder / "contexts"))
    with server.http() as client:
        kept = client.post("/v1/contexts", json={"text": "to be kept " * 20, "name": "kept"}).json()
        exported = client.get("/v1/contexts/kept/export").content
        answer = client.post("/v1/completions", json={**BODY, "context": "kept"}).json()["choices"]
        before = files(server)
        disk.fill()
        saving = {**BODY, "context": "kept"}
        for refused in (
            client.post("/v1/contexts", content=b"more text", headers=TEXT_PLAIN),
            client.post("/v1/contexts/import", content=exported),
            client.post("/v1/contexts/kept/fork", json={}),
            client.post("/v1/contexts/kept/extend", content=b"more text", headers=TEXT_PLAIN),
            client.post("/v1/completions", json={**saving, "save_context": True}),
            client.post("/v1/completions", json={**saving, "save_context": {"replace": True}}),
        ):
            assert refused.status_code == 507 and refused.json()["error"]["code"] == "disk_full", refused.url
        with client.stream("POST", "/v1/completions", json={**saving, "save_context": True, "stream": True}) as stream:
            lines = [line for line in stream.iter_lines() if line]
        assert '"code": "disk_full"' in lines[-1]
        assert files(server) == before, "nothing is left behind"
        assert client.post("/v1/completions", json=saving).json()["choices"] == answer
        assert client.get("/v1/contexts/kept").json() == kept
        assert '/v1/contexts",status="507"} 1.0' in client.get("/metrics").text
        disk.free()
        assert client.post("/v1/contexts", content=b"more text", headers=TEXT_PLAIN).status_code == 201


def test_other_errors_of_a_disk_are_defects(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve()

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "a broken disk at /secret/place")

    monkeypatch.setattr(megalodon.files, "save_file", fail)
    with server.http() as client:
        answer = client.post("/v1/contexts", json={"text": "x"})
        assert answer.status_code == 500 and answer.json()["error"]["message"] == "internal error"
        assert client.get("/v1/contexts").json()["data"] == []
        assert '/v1/contexts",status="500"} 1.0' in client.get("/metrics").text
