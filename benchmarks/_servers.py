"""Servers of two builds side by side: `megalodon serve` as it is, and as it was, over the same model.

The build before is a checkout of an earlier commit (`git worktree add FOLDER COMMIT`): its server imports its `src`. It
saves the model, so that both can load it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

HERE = Path(__file__).resolve().parent.parent
MAKE_MODEL = """
import sys, torch
from megalodon import MegalodonConfig, MegalodonForCausalLM
from megalodon.data import ByteTokenizer
torch.manual_seed(0)
model = MegalodonForCausalLM(MegalodonConfig(**eval(sys.argv[2])))
with torch.no_grad():  # what is likeliest is a letter, so that every token is a piece of text of its own
    head = model.lm_head.weight
    head[128:] = head[:128] / 2
    head[0] = 0
model.save_pretrained(sys.argv[1])
ByteTokenizer().save(sys.argv[1])
"""


@dataclass(frozen=True)
class Build:
    """A checkout: `now` is this one."""

    name: str
    path: Path

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(self.path / "src")}

    @property
    def commit(self) -> str:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=self.path, capture_output=True, text=True)
        return done.stdout.strip() or "unknown"


def builds(before: Path | None) -> list[Build]:
    """This checkout, and the one before if it is given.

    Raises:
        FileNotFoundError: if that is no checkout.
    """
    if before is not None and not (before / "src" / "megalodon").is_dir():
        raise FileNotFoundError(f"--before {before}: there is no src/megalodon; give a checkout of an earlier commit")
    found = [Build("now", HERE)]
    return found if before is None else [Build("before", before.resolve()), *found]


def save_model(build: Build, folder: Path, sizes: dict[str, Any]) -> None:
    """Save a model with random weights that writes one letter after another."""
    command = [sys.executable, "-c", MAKE_MODEL, str(folder), repr(sizes)]
    subprocess.run(command, env=build.environment, check=True)


@contextmanager
def server(build: Build, model: Path, *options: str) -> Iterator[httpx.Client]:
    """A client of a server that runs inside the `with` block."""
    contexts = model.parent / f"contexts-{build.name}-{time.monotonic_ns()}"
    command = [sys.executable, "-m", "megalodon", "serve", str(model), "--port", "0", "--name", "model"]
    command += ["--contexts", str(contexts), "--request-seconds", "3600", *options]
    process = subprocess.Popen(command, env=build.environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split(" at ")[1].split("/ ")[0]
        with httpx.Client(base_url=url, timeout=3600) as client:
            while client.get("/ready").status_code != 200:
                time.sleep(0.1)
            yield client
    finally:
        process.terminate()
        process.wait(60)


def streamed(client: httpx.Client, body: dict[str, Any]) -> Iterator[float]:
    """When each token of a streamed completion came, by `time.perf_counter`."""
    with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        if answer.status_code != 200:
            raise RuntimeError(f"{answer.status_code}: {answer.read()[:500]!r}")
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                part = json.loads(line[6:])
                if "error" in part:
                    raise RuntimeError(part["error"]["message"])
                if part["choices"] and part["choices"][0]["text"]:
                    yield time.perf_counter()
