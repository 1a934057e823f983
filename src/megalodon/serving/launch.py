"""Starting a server: model, engine, application, and a process that ends in order."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

import torch
import uvicorn

from megalodon.inference.engine import PIECE, Engine
from megalodon.inference.loading import load_model, load_tokenizer_for, torch_dtype
from megalodon.inference.prefix_cache import PrefixStore
from megalodon.serving.app import create_app
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
        return Engine(model, tokenizer, self.slots, self.queue, self.piece, made, self.share_prefixes)


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
        log_level="warning",
        timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
        h11_max_incomplete_event_size=2**16,
        server_header=False,
    )
    uvicorn.Server(config).run(sockets=[listening])
