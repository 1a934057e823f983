"""A running server as the tests see it, and how to wait for something to happen in it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import httpx
from openai import OpenAI

from megalodon.inference.engine import Engine
from megalodon.serving import Settings
from megalodon.serving.gate import Drain


@dataclass
class Server:
    """A running server."""

    url: str
    engine: Engine
    settings: Settings
    drain: Drain

    def http(self, key: str | None = None) -> httpx.Client:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=600)

    def openai(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=600)


def eventually(condition: Callable[[], bool], seconds: float = 600) -> bool:
    """Whether the condition comes true; the limit is for what hangs."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return condition()
