"""States of texts that were read before, found by the exact text: memory first, then disk.

A key is a hash of the owner and of every token up to a block boundary, so a state is found only by who has the very
text (and, unless the operator shares them, the same owner). Least recently used states leave memory for the disk, and
the disk for good.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megalodon.files import remove_partial
from megalodon.inference.snapshot import Snapshot
from megalodon.inference.snapshot_file import ModelIdentity, load_snapshot, save_snapshot
from megalodon.models import State

_log = logging.getLogger(__name__)
SUFFIX = ".prefix.safetensors"


@dataclass
class CacheCounters:
    """What the cache holds and has done."""

    hits: int = 0
    memory_bytes: int = 0
    disk_bytes: int = 0
    memory_entries: int = 0
    disk_entries: int = 0


class PrefixStore:
    """Where the states are, for all owners.

    Attributes:
        counters: for metrics.
    """

    def __init__(
        self, identity: ModelIdentity, memory_bytes: int, folder: Path | None = None, disk_bytes: int = 0
    ) -> None:
        """
        Args:
            identity: of the model; files of any other are not read.
            memory_bytes: how much the states in memory may take.
            folder: where states go that no longer fit; None drops them.
            disk_bytes: how much the files there may take.
        """
        self.counters = CacheCounters()
        self._identity, self._memory_bytes, self._folder, self._disk_bytes = identity, memory_bytes, folder, disk_bytes
        self._memory: OrderedDict[str, State] = OrderedDict()
        self._disk: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()
        self._writer = ThreadPoolExecutor(1, "prefix-cache") if folder is not None else None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            remove_partial(folder)
            for path in sorted(folder.glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime):
                self._disk[path.name.removesuffix(SUFFIX)] = path.stat().st_size
            self._trim_disk()

    def get(self, key: str) -> State | None:
        """The state of this key, if there is one."""
        with self._lock:
            state = self._memory.get(key)
            if state is not None:
                self._memory.move_to_end(key)
                self.counters.hits += 1
                return state
            on_disk = key in self._disk
        state = self._load(key) if on_disk else None
        if state is not None:
            self.counters.hits += 1
            self.put(key, state)
        return state

    def put(self, key: str, state: State) -> None:
        """Keep a state. It must not be changed afterwards."""
        with self._lock:
            if key in self._memory:
                self._memory.move_to_end(key)
                return
            self._memory[key] = state
            self.counters.memory_bytes += state.nbytes
            leaving: list[tuple[str, State]] = []
            while self._memory and self.counters.memory_bytes > self._memory_bytes:
                old, gone = self._memory.popitem(last=False)
                self.counters.memory_bytes -= gone.nbytes
                leaving.append((old, gone))
            self.counters.memory_entries = len(self._memory)
        if self._writer is not None:
            for old, gone in leaving:
                if old not in self._disk:
                    self._writer.submit(self._save, old, gone)

    def close(self) -> None:
        """Finish writing."""
        if self._writer is not None:
            self._writer.shutdown()

    def _path(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{key}{SUFFIX}"

    def _load(self, key: str) -> State | None:
        path = self._path(key)
        try:
            state = load_snapshot(path, self._identity).state
        except (OSError, ValueError):  # gone, damaged or another model's: as if it had never been there
            path.unlink(missing_ok=True)
            with self._lock:
                self._disk.pop(key, None)
            return None
        with self._lock:
            self._disk.move_to_end(key)
        return state

    def _save(self, key: str, state: State) -> None:
        snapshot = Snapshot(state, int(state.position[0]), bytes.fromhex(key), True, (), ())
        try:
            save_snapshot(self._path(key), snapshot, self._identity)
        except Exception:  # a full disk, say, loses a cached state and nothing else
            _log.exception("a cached state could not be written")
            return
        with self._lock:
            self._disk[key] = self._path(key).stat().st_size
        self._trim_disk()

    def _trim_disk(self) -> None:
        with self._lock:
            leaving = []
            while self._disk and sum(self._disk.values()) > self._disk_bytes:
                leaving.append(self._disk.popitem(last=False)[0])
            self.counters.disk_bytes, self.counters.disk_entries = sum(self._disk.values()), len(self._disk)
        for key in leaving:
            self._path(key).unlink(missing_ok=True)


class PrefixCache:
    """One owner's view of a `PrefixStore`."""

    def __init__(self, store: PrefixStore, owner: str) -> None:
        self._store, self._owner = store, owner.encode()

    def find(self, digests: Sequence[bytes]) -> tuple[int, State | None]:
        """The longest of ever longer texts that is known: (how many digests up to its own, the state), or (0, None)."""
        for count in range(len(digests), 0, -1):
            if (state := self._store.get(self._key(digests[count - 1]))) is not None:
                return count, state
        return 0, None

    def put(self, digest: bytes, state: State) -> None:
        """Keep the state after the text with this digest."""
        self._store.put(self._key(digest), state)

    def _key(self, digest: bytes) -> str:
        return hashlib.sha256(self._owner + b"\0" + digest).hexdigest()
