"""A real server on a free port: uvicorn in a thread, a small model with random weights."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvicorn
from serving_cases import Server

from engine_cases import make_engine
from megalodon.inference.prefix_cache import PrefixStore
from megalodon.serving import Settings, create_app
from megalodon.serving.protocol import PacedProtocol


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Starts servers; `serve(slots=..., setting=...)`."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(engine_options: dict[str, object] | None = None, **settings: object) -> Server:
        engine = make_engine(
            prefixes=lambda identity: PrefixStore(identity, 1 << 24), **{"slots": 16, **(engine_options or {})}
        )
        chosen = {"model_name": "tiny", "contexts": str(tmp_path_factory.mktemp("contexts")), "drain_seconds": 5}
        made = Settings(**{**chosen, **settings})
        app = create_app(engine, made)
        config = uvicorn.Config(app, http=PacedProtocol, port=0, log_level="warning", timeout_graceful_shutdown=5)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        running.append((server, thread))
        port = server.servers[0].sockets[0].getsockname()[1]
        return Server(f"http://127.0.0.1:{port}", engine, made, app.state.drain)

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="session")
def server(serve: Callable[..., Server]) -> Server:
    """One server without keys, for tests that leave nothing behind that others would mind."""
    return serve()


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    """Two keys: alice-secret-1 in plain, bob-secret-22 hashed."""
    import hashlib

    path = tmp_path / "keys"
    hashed = hashlib.sha256(b"bob-secret-22").hexdigest()
    path.write_text(f"# who may\nalice = alice-secret-1\nsha256:{hashed}\n")
    return path
