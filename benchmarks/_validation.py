"""What one hostile or large request does to the others: how late `/health` answers, and how much memory it takes."""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
from _report import markdown_table
from _servers import builds, save_model, server

SIZES = {
    "vocab_size": 256,
    "num_layers": 2,
    "model_dim": 32,
    "z_dim": 16,
    "value_dim": 32,
    "ffn_hidden_dim": 32,
    "num_heads": 2,
    "cema_ndim": 4,
    "chunk_size": 256,
    "norm_num_groups": 4,
}
MEGABYTE = 2**20
EVERY = 0.005
"""Seconds between two looks at `/health` and at the server's memory."""
MOST_LATE, MOST_MEMORY = 100.0, 8.0
IDLE_SECONDS = 3.0


def bodies(size: int) -> dict[str, tuple[str, bytes]]:
    """(path, body of about `size` bytes) by what it is."""

    def prompt(element: bytes, last: bytes = b"1") -> bytes:
        return b'{"model": "model", "max_tokens": 1, "prompt": [' + element * (size // len(element)) + last + b"]}"

    def text(unit: bytes) -> bytes:
        return b'{"model": "none", "max_tokens": 1, "prompt": "' + unit * (size // len(unit)) + b'"}'

    def filled(begin: bytes, unit: bytes, end: bytes) -> bytes:
        return begin + unit * (size // len(unit)) + end

    completions, chat, responses = "/v1/completions", "/v1/chat/completions", "/v1/responses"
    message = b'{"model": "none", "messages": [{"role": "user", "content": "'
    biases = b",".join(b'"%d":"x"' % i for i in range(30_000))
    digits = b"[" + b",".join([b"9" * 4299] * 16) + b"],"
    return {
        "list of empty lists": (completions, prompt(b"[],")),
        "list of empty objects": (completions, prompt(b"{},")),
        "list of short strings, then a number": (completions, prompt(b'"a",')),
        "token ids, then a string": (completions, prompt(b"1,", b'"x"')),
        "token ids with a fraction": (completions, prompt(b"1.5,")),
        "token ids out of range": (completions, prompt(b"999,")),
        "unknown fields": (completions, b"{" + b",".join(b'"%07d":1' % i for i in range(size // 12)) + b"}"),
        "wrong messages": (chat, b'{"model": "model", "messages": [' + b'{"role":1},' * (size // 11) + b"1]}"),
        "nested lists": (completions, b'{"prompt": ' + b"[" * size + b"}"),
        "a number of many digits": (completions, b'{"prompt": ' + b"9" * size + b"}"),
        "a text of escapes, for another model": (completions, text(b"\\n")),
        "a text of letters, for another model": (completions, text(b"a")),
        "numbers of 4,299 digits": (completions, filled(b'{"metadata": [', digits, b"1]}")),
        "white space": (completions, filled(b'{"prompt": ', b" ", b'"a"}')),
        "a long name": (completions, filled(b'{"', b"\\n", b'": 1}')),
        "biases that are none": (completions, b'{"model": "model", "logit_bias": {' + biases + b"}}"),
        "a message, for another model": (chat, filled(message, b"a", b'"}]}')),
        "instructions": (responses, filled(b'{"model": "model", "input": "a", "instructions": "', b"\\u00e9", b'"}')),
        "input, for another model": (responses, filled(b'{"model": "none", "input": "', b"\\n", b'"}')),
        "embeddings, ids out of range": ("/v1/embeddings", filled(b'{"model": "model", "input": [', b"999,", b"1]}")),
        "a text to tokenize": ("/tokenize", filled(b'{"prompt": "', b"a", b'"}')),
        "ids to detokenize": ("/detokenize", filled(b'{"tokens": [', b"97,", b"97]}")),
        "a context's text with a NUL": ("/v1/contexts", filled(b'{"text": "', b"a", b'\\u0000"}')),
        "a context file that is none": ("/v1/contexts/import", b"\xff" * size),
        "no JSON": (completions, b"\xff" * size),
    }


class Watch:
    """How late `/health` answers and how much memory the server has, while it lasts."""

    def __init__(self, url: httpx.URL, process: psutil.Process) -> None:
        self.waits: list[float] = []
        self.memory: list[int] = [process.memory_info().rss]
        self._url, self._process, self._over = url, process, threading.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Watches inside the `with` block, and a moment before and after."""
        threads = [threading.Thread(target=work) for work in (self._ask, self._look)]
        for thread in threads:
            thread.start()
        time.sleep(0.1)
        try:
            yield
        finally:
            time.sleep(0.3)
            self._over.set()
            for thread in threads:
                thread.join()

    def _ask(self) -> None:
        with httpx.Client(base_url=self._url, timeout=300) as client:
            client.get("/health")
            while not self._over.is_set() or not self.waits:
                began = time.perf_counter()
                with suppress(httpx.HTTPError):  # a connection that was kept open may be closed after a long wait
                    client.get("/health")
                self.waits.append(time.perf_counter() - began)
                time.sleep(EVERY)

    def _look(self) -> None:
        while not self._over.is_set():
            with suppress(psutil.Error):
                self.memory.append(self._process.memory_info().rss)
            time.sleep(EVERY)


LARGEST_BEFORE = 4
"""MB that the build before is given: it takes hundreds of times that in memory, and minutes."""


def measure_validation(before: Path | None, sizes: list[int], rounds: int) -> dict[str, Any]:
    """Every body at every size (MB), for the build before (once, and not the largest) and for this one."""
    samples: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        all_builds = builds(before)
        save_model(all_builds[0], model, SIZES)
        for build in all_builds:
            with server(build, model) as client:
                process = _newest_child()
                _sample(client, process, "/v1/completions", b'{"model": "model", "prompt": [[]]}')  # what is made once
                idle = Watch(client.base_url, process)
                with idle.running():
                    time.sleep(IDLE_SECONDS)
                samples.append({"build": build.name, "what": "idle", "size": 0, "late": max(idle.waits)})
                earlier = build is not all_builds[-1]
                for size in sizes:
                    if earlier and size > LARGEST_BEFORE:
                        continue
                    for what, (path, body) in bodies(size * MEGABYTE).items():
                        for _ in range(1 if earlier else rounds):
                            samples.append(
                                _sample(client, process, path, body) | {"build": build.name, "what": what, "size": size}
                            )
                            print(samples[-1], flush=True)
    return {"samples": samples, "sizes": sizes, "commits": {build.name: build.commit for build in all_builds}}


def _newest_child() -> psutil.Process:
    children = psutil.Process(os.getpid()).children()
    return max(children, key=lambda child: child.create_time())


def _sample(client: httpx.Client, process: psutil.Process, path: str, body: bytes) -> dict[str, Any]:
    watch = Watch(client.base_url, process)
    with watch.running():
        began = time.perf_counter()
        try:
            answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
            status, length = answer.status_code, len(answer.content)
        except httpx.HTTPError as error:
            status, length = type(error).__name__, 0
        seconds = time.perf_counter() - began
    return {
        "status": status,
        "answer_bytes": length,
        "seconds": seconds,
        "late": max(watch.waits),
        "memory": (max(watch.memory) - watch.memory[0]) / len(body),
    }


def validation_parts(result: dict[str, Any]) -> list[str]:
    """The tables: the median of the rounds for the delay, the most for the memory."""
    parts: list[str] = []
    for build, commit in result["commits"].items():
        own = [sample for sample in result["samples"] if sample["build"] == build]
        idle = next(sample["late"] for sample in own if sample["what"] == "idle")
        rows = []
        for size in result["sizes"]:
            for what in dict.fromkeys(sample["what"] for sample in own if sample["size"] == size):
                some = [sample for sample in own if (sample["size"], sample["what"]) == (size, what)]
                late = statistics.median(sample["late"] for sample in some)
                row = [what, str(size), str(some[0]["status"]), f"{some[0]['seconds']:.2f}", f"{late * 1e3:,.0f}"]
                rows.append([*row, f"{max(sample['memory'] for sample in some):.1f}"])
        head = ["body ", "MB", "status", "answered after, s", "/health later by at most, ms", "memory, times its size"]
        worst = max(statistics.median([float(row[4].replace(",", ""))]) for row in rows)
        parts += [f"## {build} ({commit})", "", markdown_table(head, rows), ""]
        parts += [f"Idle, `/health` took at most {idle * 1e3:.0f} ms. Worst above: {worst:,.0f} ms.", ""]
    parts.append(f"Aim: at most {MOST_LATE:g} ms and {MOST_MEMORY:g} times the size.")
    return parts
