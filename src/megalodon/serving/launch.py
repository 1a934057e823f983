"""Starting a server: model, engine, application, and a process that ends in order."""

from __future__ import annotations

import gc
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import uvicorn

from megalodon.inference.engine import PIECE, Engine
from megalodon.inference.loading import load_model, load_tokenizer_for, torch_dtype
from megalodon.inference.prefix_cache import PrefixStore
from megalodon.models.storage import Storage
from megalodon.serving.app import create_app
from megalodon.serving.protocol import PacedProtocol
from megalodon.serving.settings import Settings


@dataclass(frozen=True)
class EngineOptions:
    """Which model, and how its engine is made. Sizes are bytes; the rest as in `load_model` and `Engine`."""

    folder: Path
    tokenizer: str | None = None
    device: str | None = None
    dtype: str | None = None
    slots: int = 32
    queue: int = 256
    piece: int = PIECE
    prefix_memory: int = 2**30
    prefix_folder: Path | None = None
    prefix_disk: int = 10 * 2**30
    share_prefixes: bool = False
    context_storage: Storage = "exact"

    def engine(self) -> Engine:
        """Load the model and make the engine.

        Raises:
            FileNotFoundError, ValueError: as `load_model`, `load_tokenizer_for` and `Engine`.
        """
        model = load_model(self.folder, self.device, torch_dtype(self.dtype))
        tokenizer = load_tokenizer_for(model, self.folder, self.tokenizer)

        def prefixes(identity):
            return PrefixStore(identity, self.prefix_memory, self.prefix_folder, self.prefix_disk)

        made = prefixes if self.prefix_memory else None
        return Engine(
            model, tokenizer, self.slots, self.queue, self.piece, made, self.share_prefixes, self.context_storage
        )


class EndingServer(uvicorn.Server):
    """A server that, when it is told to stop, goes on answering: what runs is finished, what is new gets a 503, until
    nothing runs or `seconds` are over. Told again, it stops at once."""

    def __init__(self, config: uvicorn.Config, drain: Any, seconds: float) -> None:
        """`drain`: the application's, with `begun` and `running`."""
        super().__init__(config)
        self._drain, self._seconds, self._end = drain, seconds, float("inf")
        self._told: int = signal.SIGTERM

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal."""
        if self._drain.begun or sig not in (signal.SIGTERM, signal.SIGINT):
            super().handle_exit(sig, frame)
            return
        self._told, self._drain.begun, self._end = sig, True, time.monotonic() + self._seconds

    async def on_tick(self, counter: int) -> bool:
        """Whether to stop now; asked ten times a second."""
        if self._drain.begun and not self.should_exit and (not self._drain.running or time.monotonic() > self._end):
            self.config.timeout_graceful_shutdown = 1  # whoever still runs has had the time
            super().handle_exit(self._told, None)
        return await super().on_tick(counter)


def settle() -> None:
    """Have the garbage collector leave alone what is there when serving begins.

    To look through the half million objects of the libraries takes it a quarter of a second, in which no thread runs.
    """
    gc.collect()
    gc.freeze()


def serve_here(options: EngineOptions, settings: Settings, host: str, port: int) -> None:
    """Serve in this process until SIGTERM or Ctrl-C; running requests then have `drain_seconds` to finish.

    Raises:
        OSError: if the address cannot be listened on.
    """
    listening = socket.create_server(
        (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=512
    )
    engine = options.engine()
    app = create_app(engine, settings)
    address = listening.getsockname()
    print(
        f"megalodon: {settings.model_name} at http://{host}:{address[1]}/ with {engine.slots} slots, "
        f"{torch.get_num_threads()} threads",
        flush=True,
    )
    config = uvicorn.Config(
        app,
        http=PacedProtocol,
        log_level="warning",
        timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
        h11_max_incomplete_event_size=2**16,
        server_header=False,
    )
    settle()
    EndingServer(config, app.state.drain, settings.drain_seconds).run(sockets=[listening])
