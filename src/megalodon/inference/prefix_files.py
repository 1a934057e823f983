"""Cached states as files: written beside the engine, found again when the server starts."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from megalodon.files import remove_partial
from megalodon.inference.snapshot import Snapshot
from megalodon.inference.snapshot_file import ModelIdentity, load_snapshot, save_snapshot
from megalodon.models import State

_log = logging.getLogger(__name__)
SUFFIX = ".prefix.safetensors"


class PrefixFiles:
    """A folder of states, each named by its key."""

    def __init__(self, folder: Path, identity: ModelIdentity) -> None:
        """Make the folder, and remove what a crash left half written."""
        self._folder, self._identity = folder, replace(identity, storage="exact")  # they stand for reading a text
        folder.mkdir(parents=True, exist_ok=True)
        remove_partial(folder)

    def __iter__(self) -> Iterator[tuple[str, int]]:
        """(key, bytes) of each file, the oldest first."""
        for path in sorted(self._folder.glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime):
            yield path.name.removesuffix(SUFFIX), path.stat().st_size

    def load(self, key: str) -> State | None:
        """The state in a file; None, and no file, if it is gone, damaged, or another model's."""
        try:
            return load_snapshot(self._path(key), self._identity).state
        except (OSError, ValueError):
            self.remove(key)
            return None

    def save(self, key: str, state: State) -> int:
        """Write a file; its bytes, 0 if it cannot be written."""
        snapshot = Snapshot(state, int(state.position[0]), bytes.fromhex(key), True, (), ())
        try:
            save_snapshot(self._path(key), snapshot, self._identity)
            return self._path(key).stat().st_size
        except Exception:  # a full disk, say, loses a cached state and nothing else
            _log.exception("a cached state could not be written")
            return 0

    def remove(self, key: str) -> None:
        """Remove a file if it is there."""
        self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}{SUFFIX}"
