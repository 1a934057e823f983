"""A server under mixed load for minutes: nothing may leak, nobody may see another's text, nothing may answer 500.

Users with keys of their own send completions and streams of known outcome, make, extend, export, import and delete
contexts, cancel, disconnect, and send what is malformed, oversized, or signed with a key that has been withdrawn. A
request gives the same text alone and among others, so every whole answer is compared with the one that the same
request got from the idle server: a token of somebody else's would show. Memory, file descriptors, slots, and files are
compared between a warmed-up server and the end.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import httpx
import torch
import typer
from _machine import describe_machine
from _report import RESULTS, document, markdown_table, new_run, save

from megalodon import MegalodonConfig, MegalodonForCausalLM
from megalodon.choices import DtypeName
from megalodon.data import ByteTokenizer

USERS, WITHDRAWN = 6, 2
MAX_BODY, MAX_UPLOAD = 20_000, 60_000
PATIENCE = 300
"""Seconds for an answer: the machine may be busy with other work."""
CODES = {"timeout": 408, "overloaded": 503, "stopping": 503, "cancelled": 499, "internal_error": 500}
"""The status that each error would have had, had it not come within a stream."""
ALLOWED = {200, 201, 400, 401, 403, 404, 405, 408, 409, 413, 429, 499, 503}
MEMORY_ALLOWANCE = 48e6


def make_model(folder: Path) -> None:
    torch.manual_seed(0)
    config = MegalodonConfig(
        vocab_size=256, num_layers=2, model_dim=64, z_dim=32, value_dim=128, ffn_hidden_dim=64, cema_ndim=4,
        chunk_size=64, norm_num_groups=8,
    )  # fmt: skip
    MegalodonForCausalLM(config).save_pretrained(folder)
    ByteTokenizer().save(folder)


class ServerProcess:
    """The server under load, and what the system says about it."""

    def __init__(self, folder: Path, keys: list[str], dtype: DtypeName) -> None:
        make_model(folder / "model")
        self.key_file, self.contexts = folder / "keys", folder / "contexts"
        self.key_file.write_text("\n".join(keys))
        command = [sys.executable, "-m", "megalodon", "serve", str(folder / "model"), "--port", "0", "--slots", "16"]
        command += ["--contexts", str(self.contexts), "--key-file", str(self.key_file), "--queue", "24"]
        command += ["--max-body", str(MAX_BODY), "--max-upload", str(MAX_UPLOAD), "--max-tokens", "500"]
        command += ["--max-concurrent", "2", "--prefix-memory", "2", "--prefix-folder", str(folder / "prefixes")]
        command += ["--prefix-disk", "2", "--max-prompt-tokens", "30000", "--request-seconds", "30"]
        command += ["--dtype", dtype.value]
        log = (folder / "log").open("w")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().split(" at ")[1].split("/ ")[0]
        self.log = folder / "log"
        try:
            while httpx.get(f"{self.url}/ready", timeout=PATIENCE).status_code != 200:
                time.sleep(0.1)
        except httpx.HTTPError:
            self.process.kill()
            raise

    def resident(self) -> int:
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))

    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def gauge(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics", timeout=PATIENCE).text
        return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"megalodon_{name} "))

    def wait_until_idle(self) -> bool:
        for _ in range(300):
            if not any(self.gauge(name) for name in ("queue_length", "reading", "generating")):
                return True
            time.sleep(0.1)
        return False


class User:
    """One key, its requests of known outcome, and what went wrong with them."""

    def __init__(self, number: int, url: str, key: str) -> None:
        self.random, self.number = random.Random(number), number
        self.client = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=PATIENCE)
        self.expected: list[tuple[dict[str, Any], str]] = []
        self.contexts: list[str] = []
        self.statuses: Counter[int] = Counter()
        self.wrong: list[str] = []
        self.compared = 0

    def learn(self) -> None:
        """Ask the idle server for the outcomes."""
        for i in range(6):
            prompt = f"The diary of user {self.number}, page {i}: " + "very private " * (1 + 12 * i)
            body = {"model": "model", "prompt": prompt, "max_tokens": 10 + 5 * i, "seed": self.number * 100 + i}
            answer = self.client.post("/v1/completions", json=body)
            self.expected.append((body, answer.json()["choices"][0]["text"]))

    def act(self) -> None:
        """One thing that a user might do."""
        actions = [
            self.complete,
            self.stream,
            self.several,
            self.context,
            self.hang_up,
            self.misbehave,
            self.upload_cut,
        ]
        try:
            self.random.choices(actions, weights=[6, 6, 2, 4, 3, 3, 1])[0]()
        except httpx.TransportError as error:
            if "cut" not in str(error):
                self.wrong.append(f"transport: {error!r}")

    def note(self, answer: httpx.Response) -> bool:
        self.statuses[answer.status_code] += 1
        if answer.status_code in (401, 429):
            time.sleep(0.2)
        if answer.status_code not in ALLOWED:
            self.wrong.append(f"{answer.request.method} {answer.request.url}: {answer.status_code}")
        return answer.status_code in (200, 201)

    def compare(self, text: str, expected: str) -> None:
        self.compared += 1
        if text != expected:
            self.wrong.append(f"user {self.number} got {text!r}, not {expected!r}")

    def complete(self) -> None:
        body, expected = self.random.choice(self.expected)
        answer = self.client.post("/v1/completions", json=body)
        if self.note(answer):
            self.compare(answer.json()["choices"][0]["text"], expected)

    def stream(self) -> None:
        body, expected = self.random.choice(self.expected)
        with self.client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            if not self.note(answer):
                return
            lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
        parts = [json.loads(line[6:]) for line in lines if line != "data: [DONE]"]
        if parts and "error" in parts[-1]:
            status = CODES.get(parts[-1]["error"]["code"], 500)
            self.statuses[status] += 1
            if status not in ALLOWED:
                self.wrong.append(f"stream: {parts[-1]['error']}")
        elif not lines or lines[-1] != "data: [DONE]":
            self.wrong.append(f"a stream of user {self.number} broke off after {len(parts)} parts")
        else:
            self.compare("".join(part["choices"][0]["text"] for part in parts), expected)

    def several(self) -> None:
        body, expected = self.random.choice(self.expected)
        answer = self.client.post("/v1/completions", json={**body, "n": self.random.randint(2, 4)})
        if self.note(answer):
            self.compare(answer.json()["choices"][0]["text"], expected)

    def context(self) -> None:
        body, expected = self.random.choice(self.expected)
        cut = self.random.randrange(1, len(body["prompt"]))
        made = self.client.post("/v1/contexts", content=body["prompt"][:cut].encode(), params={"expires_in": 120})
        if not self.note(made):
            return
        context = made.json()["id"]
        if self.random.random() < 0.5:
            exported = self.client.get(f"/v1/contexts/{context}/export")
            imported = self.client.post("/v1/contexts/import", content=exported.content)
            self.note(exported), self.note(imported)
            self.note(self.client.delete(f"/v1/contexts/{context}"))
            if imported.status_code != 201:
                return
            context = imported.json()["id"]
        if self.random.random() < 0.5:
            answer = self.client.post(
                "/v1/completions", json={**body, "context": context, "prompt": body["prompt"][cut:]}
            )
        else:
            extended = self.client.post(f"/v1/contexts/{context}/extend", json={"text": body["prompt"][cut:]})
            if not self.note(extended):
                return
            answer = self.client.post("/v1/completions", json={**body, "context": context, "prompt": ""})
        if self.note(answer):
            self.compare(answer.json()["choices"][0]["text"], expected)
        self.note(self.client.delete(f"/v1/contexts/{context}"))

    def hang_up(self) -> None:
        body = {**self.random.choice(self.expected)[0], "max_tokens": 500, "ignore_end": True}
        if self.random.random() < 0.5:
            try:
                self.client.post("/v1/completions", json=body, timeout=self.random.random())
            except httpx.ReadTimeout:
                return
        with self.client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            self.note(answer)
            for count, _ in enumerate(answer.iter_lines()):
                if count > self.random.randrange(40):
                    return

    def upload_cut(self) -> None:
        def parts():
            yield b"some text " * 50
            raise httpx.WriteError("cut")

        self.client.post("/v1/contexts", content=parts())

    def misbehave(self) -> None:
        client, model = self.client, "model"
        choices = [
            lambda: client.post("/v1/completions", content=self.random.randbytes(200)),
            lambda: client.post("/v1/completions", json={"model": model, "prompt": "x" * MAX_BODY}),
            lambda: client.post("/v1/contexts", content=b"y" * (MAX_UPLOAD + 1)),
            lambda: client.post("/v1/contexts", content=self.random.randbytes(3000)),
            lambda: client.post("/v1/contexts/import", content=self.random.randbytes(3000)),
            lambda: client.post("/v1/completions", json={"model": model, "prompt": "x", "max_tokens": 10**9}),
            lambda: client.get("/v1/contexts/..%2f..%2fkeys"),
            lambda: client.get("/v1/models", headers={"Authorization": "Bearer nobodys-key"}),
            lambda: client.post("/v1/completions", json={"model": model, "context": f"ctx_{'0' * 24}"}),
        ]
        if self.note(self.random.choice(choices)()):
            self.wrong.append("misbehaviour was accepted")


def load(users: list[User], seconds: float, threads: int) -> None:
    """All users act at once."""
    end = time.monotonic() + seconds

    def run(user: User) -> None:
        while time.monotonic() < end:
            user.act()

    workers = [threading.Thread(target=run, args=(users[i % len(users)],)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def main(
    seconds: Annotated[float, typer.Option(help="of load")] = 600.0,
    threads: Annotated[int, typer.Option(help="clients at once")] = 18,
    dtype: Annotated[DtypeName, typer.Option(help="of the server's weights")] = DtypeName.float32,
    output: Annotated[Path, typer.Option()] = RESULTS,
) -> None:
    """Load a server, then write what was found; exit status 1 if anything was wrong."""
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        keys = [f"key-of-user-{i}" for i in range(USERS + WITHDRAWN)]
        server = ServerProcess(Path(folder), keys, dtype)
        try:
            users = [User(i, server.url, key) for i, key in enumerate(keys)]
            for user in users:
                user.learn()
            load(users, max(seconds / 10, 2), threads)  # memory settles
            server.wait_until_idle()
            before = {"resident": server.resident(), "descriptors": server.descriptors()}
            server.key_file.write_text("\n".join(keys[:USERS]))
            load(users, seconds, threads)
            idle = server.wait_until_idle()
            time.sleep(7)  # connections that clients left are closed after five seconds
            after = {"resident": server.resident(), "descriptors": server.descriptors()}
            files = [path.name for path in server.contexts.rglob("*") if path.is_file()]
            leftover = [name for name in files if ".partial" in name]
            statuses = sum((user.statuses for user in users), Counter())
            errors = server.log.read_text()
        finally:
            server.process.terminate()
            server.process.wait(60)
    wrong = [problem for user in users for problem in user.wrong]
    wrong += [] if idle else ["the engine is not idle after the load"]
    wrong += [f"left behind: {leftover}"] if leftover else []
    wrong += [f"log: {errors[-2000:]}"] if "Traceback" in errors else []
    if after["resident"] - before["resident"] > MEMORY_ALLOWANCE:
        wrong.append(f"resident memory rose from {before['resident']:,} to {after['resident']:,} bytes")
    if after["descriptors"] > before["descriptors"] + threads:
        wrong.append(f"open files rose from {before['descriptors']} to {after['descriptors']}")
    result = new_run("soak", describe_machine(512), {"seconds": seconds, "threads": threads, "dtype": dtype.value})
    result |= {
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "compared": sum(user.compared for user in users),
        "before": before,
        "after": after,
        "files": len(files),
        "wrong": wrong,
    }
    rows = [[str(status), f"{count:,}"] for status, count in sorted(statuses.items())]
    parts = [
        f"{seconds:g} seconds, {dtype.value}; {threads} clients of {USERS} users and {WITHDRAWN} with withdrawn keys.",
        "",
        markdown_table(["status", "answers"], rows),
        "",
        f"{result['compared']:,} whole answers compared with what the idle server gave: "
        f"{sum('got' in problem for problem in wrong)} differed. Resident memory "
        f"{before['resident'] / 1e6:.0f} MB before, {after['resident'] / 1e6:.0f} MB after; open files "
        f"{before['descriptors']} and {after['descriptors']}; files of contexts left (not yet expired): {len(files)}; "
        f"problems: {len(wrong)}.",
        *[f"- {problem}" for problem in wrong[:20]],
    ]
    save(
        result,
        document("A server under mixed load", result, parts, quick=seconds < 600),
        output,
        "soak" if dtype == DtypeName.float32 else f"soak-{dtype.value}",
    )
    print("\n".join(parts))
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    typer.run(main)
