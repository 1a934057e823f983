"""Contexts that live on disk: named, owned, expiring; a folder or any store that fsspec knows.

A context is a data file (`snapshot_file`) and a small record that names it. The data file is written first and the
record put in place last, so a crash leaves the context as it was, or as it should be. Extending writes a new data file
and replaces the record. Files are named by owner and id alone, both checked; what users type never becomes a path.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from megalodon.files import write_text
from megalodon.inference.snapshot import Snapshot
from megalodon.inference.snapshot_file import ModelIdentity, load_snapshot, save_snapshot

ID = re.compile(r"ctx_[0-9a-f]{24}")
OWNER = re.compile(r"[0-9a-z-]{1,64}")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}")
_log = logging.getLogger(__name__)
ORPHAN_SECONDS = 3600.0
"""A data file without a record is removed after so long: it may just be being written."""


class NoContextError(LookupError):
    """There is no such context, or it is another owner's."""


class NameTakenError(ValueError):
    """The owner has another context of this name."""


class ChangedError(RuntimeError):
    """The context was changed by somebody else meanwhile."""


@dataclass(frozen=True)
class ContextRecord:
    """What is known of a context without reading it.

    Attributes:
        id, owner: where it is kept. name: the owner's own, or None.
        created, changed: seconds since 1970. expires: likewise; None for never.
        tokens: length of its text. bytes: size of its file, which does not grow with the text.
        model, tokenizer, text: fingerprints; text is None where a part of it was read by the command line.
        parent: the context it was forked from.
        data: its data file.
    """

    id: str
    owner: str
    name: str | None
    created: float
    changed: float
    expires: float | None
    tokens: int
    bytes: int
    model: str
    tokenizer: str
    text: str | None
    parent: str | None
    data: str


class ContextStore:
    """All contexts of a server, or of several that share a folder or bucket."""

    def __init__(self, url: str, identity: ModelIdentity) -> None:
        """
        Args:
            url: a folder, made if it does not exist, or an fsspec URL.
            identity: of the model that contexts are read and written by.

        Raises:
            OSError: if the place cannot be used.
            ValueError: if fsspec does not know the URL's protocol.
        """
        self.identity = identity
        self._fs, root = url_to_fs(url)
        self._root = root.rstrip("/")
        self._local = isinstance(self._fs, LocalFileSystem)
        self._fs.makedirs(self._root, exist_ok=True)
        self._lock = threading.Lock()

    # --- records ----------------------------------------------------------------------------------------------------

    def owned(self, owner: str) -> list[ContextRecord]:
        """The owner's contexts, newest first. Expired ones are removed on the way."""
        now = time.time()
        found = []
        for record in self._records(owner):
            if record.expires is not None and record.expires <= now:
                self._remove(record)
            else:
                found.append(record)
        return sorted(found, key=lambda record: (record.created, record.id), reverse=True)

    def count(self, owner: str) -> int:
        """How many contexts the owner has, expired ones included until they are removed."""
        return sum(path.endswith(".json") for path in self._entries(owner))

    def get(self, owner: str, key: str) -> ContextRecord:
        """The owner's context of this id or name.

        Raises:
            NoContextError: if there is none, or it has expired.
        """
        if ID.fullmatch(key):
            record = self._record(owner, key)
            if record is not None and (record.expires is None or record.expires > time.time()):
                return record
        elif NAME.fullmatch(key):
            for record in self.owned(owner):
                if record.name == key:
                    return record
        raise NoContextError(f"no context {key[:80]!r}")

    def update(self, owner: str, key: str, **changes: str | float | None) -> ContextRecord:
        """Change a context's `name` or `expires`."""
        with self._lock:
            record = self.get(owner, key)
            self._check_name(owner, changes.get("name"), record.id)
            changed = replace(record, **changes, changed=time.time())  # type: ignore[arg-type]
            self._write_record(changed)
        return changed

    def delete(self, owner: str, key: str) -> None:
        """Remove a context for good."""
        self._remove(self.get(owner, key))

    # --- contents ---------------------------------------------------------------------------------------------------

    def create(
        self, owner: str, snapshot: Snapshot, name: str | None, expires: float | None, parent: str | None = None
    ) -> ContextRecord:
        """Save a snapshot as a new context.

        Raises:
            NameTakenError: if the owner has a context of this name.
            OSError: if it cannot be written; nothing is left behind.
        """
        return self._publish(self._new_record(owner, name, expires, parent), snapshot)

    def extend(self, owner: str, key: str, snapshot: Snapshot, since: ContextRecord) -> ContextRecord:
        """Replace what a context holds.

        Raises:
            ChangedError: if it is no longer as `since`, which the snapshot was made from.
        """
        return self._publish(replace(since, changed=time.time(), data=_data_name(since.id)), snapshot, since)

    def load(self, record: ContextRecord) -> Snapshot:
        """The contents.

        Raises:
            NoContextError: if it was deleted meanwhile.
            ValueError: if the file is damaged or belongs to another model, dtype or tokenizer.
        """
        with self.file(record) as path:
            return load_snapshot(path, self.identity)

    def file(self, record: ContextRecord) -> _Fetched:
        """A context manager that gives the data file as a local path, for export."""
        return _Fetched(self, record)

    def import_file(
        self, owner: str, path: Path, name: str | None, expires: float | None, parent: str | None = None
    ) -> ContextRecord:
        """Make a context of an exported file, or of one that the command line saved.

        Raises:
            ValueError: if the file is damaged or belongs to another model, dtype or tokenizer.
            NameTakenError: if the owner has a context of this name.
        """
        snapshot = load_snapshot(path, self.identity)
        if not snapshot.tail:
            raise ValueError("the context file is damaged: it holds no token to go on from")
        # Anybody may have made the file, so its state is no proof of what reading the text in its digest gives.
        return self._publish(self._new_record(owner, name, expires, parent), replace(snapshot, read_only=False))

    def sweep(self) -> None:
        """Remove expired contexts, and data files that a crash left without a record."""
        for folder in self._folders():
            for record in self._records(folder):
                if record.expires is not None and record.expires <= time.time():
                    self._remove(record)
            records, paths = list(self._records(folder)), self._entries(folder)
            names = [path.rsplit("/", 1)[-1] for path in paths]
            spared = {record.data for record in records}
            unreadable = {name.removesuffix(".json") for name in names} - {record.id for record in records}
            for path, name in zip(paths, names, strict=True):
                orphan = name not in spared and name.split(".")[0] not in unreadable
                if orphan and not name.endswith(".json") and self._age(path) > ORPHAN_SECONDS:
                    with suppress(FileNotFoundError):
                        self._fs.rm_file(path)

    # --- files ------------------------------------------------------------------------------------------------------

    def _new_record(self, owner: str, name: str | None, expires: float | None, parent: str | None) -> ContextRecord:
        self._check_name(owner, name, None)
        context_id, now = f"ctx_{secrets.token_hex(12)}", time.time()
        return ContextRecord(
            context_id, owner, name, now, now, expires, 0, 0, "", "", None, parent, _data_name(context_id)
        )

    def _publish(self, record: ContextRecord, snapshot: Snapshot, since: ContextRecord | None = None) -> ContextRecord:
        target = self._path(record.owner, record.data)
        record = replace(
            record,
            tokens=snapshot.tokens,
            bytes=self._write_data(target, snapshot),
            model=self.identity.model,
            tokenizer=self.identity.tokenizer,
            text=snapshot.text_fingerprint,
        )
        try:
            with self._lock:
                if since is None:
                    self._check_name(record.owner, record.name, record.id)
                elif self._record(record.owner, record.id) != since:
                    raise ChangedError(f"context {record.id} was changed or deleted meanwhile: read it again")
                self._write_record(record)
        except BaseException:
            self._fs.rm_file(target)
            raise
        if since is not None:
            with suppress(FileNotFoundError):
                self._fs.rm_file(self._path(since.owner, since.data))
        return record

    def _write_data(self, target: str, snapshot: Snapshot) -> int:
        """Write a data file; its size. On a disk it is renamed when whole; an object store never shows half of one."""
        self._fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
        if self._local:
            save_snapshot(Path(target), snapshot, self.identity)
            return Path(target).stat().st_size
        with tempfile.TemporaryDirectory(prefix="context-") as folder:
            path = Path(folder) / "data"
            save_snapshot(path, snapshot, self.identity)
            self._fs.put_file(str(path), target)
            return path.stat().st_size

    def _write_record(self, record: ContextRecord) -> None:
        path, text = self._path(record.owner, f"{record.id}.json"), json.dumps(asdict(record))
        if self._local:
            write_text(Path(path), text)
        else:
            self._fs.pipe_file(path, text.encode())

    def _record(self, owner: str, context_id: str) -> ContextRecord | None:
        path = self._path(owner, f"{context_id}.json")
        try:
            return ContextRecord(**json.loads(self._fs.cat_file(path)))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):  # somebody else's doing: the owner's other contexts are not to suffer
            _log.exception("the record %s is damaged: its context is passed over", path)
            return None

    def _records(self, owner: str) -> Iterator[ContextRecord]:
        for path in self._entries(owner):
            name = path.rsplit("/", 1)[-1]
            if ID.fullmatch(name.removesuffix(".json")) and (record := self._record(owner, name[:-5])) is not None:
                yield record

    def _entries(self, owner: str) -> list[str]:
        self._fs.invalidate_cache()
        try:
            return [str(path) for path in self._fs.ls(self._path(owner), detail=False)]
        except FileNotFoundError:
            return []

    def _folders(self) -> list[str]:
        self._fs.invalidate_cache()
        names = (str(path).rstrip("/").rsplit("/", 1)[-1] for path in self._fs.ls(self._root, detail=False))
        return [name for name in names if OWNER.fullmatch(name)]

    def _remove(self, record: ContextRecord) -> None:
        for name in (f"{record.id}.json", record.data):  # the record first: without it there is no context
            with suppress(FileNotFoundError):
                self._fs.rm_file(self._path(record.owner, name))

    def _age(self, path: str) -> float:
        try:
            return time.time() - self._fs.modified(path).timestamp()
        except (FileNotFoundError, NotImplementedError):
            return 0.0

    def _path(self, owner: str, *names: str) -> str:
        if not OWNER.fullmatch(owner):
            raise ValueError(f"owner {owner!r} is no name for a folder")
        return "/".join((self._root, owner, *names))

    def _check_name(self, owner: str, name: str | float | None, own: str | None) -> None:
        if name is None:
            return
        if not NAME.fullmatch(str(name)) or ID.fullmatch(str(name)):
            raise ValueError("name: 1 to 64 letters, digits and any of ' ._-', beginning with a letter or digit")
        if any(record.name == name and record.id != own for record in self.owned(owner)):
            raise NameTakenError(f"there is a context named {name!r} already")


class _Fetched:
    """The data file of a record as a local path, for the length of a `with` block."""

    def __init__(self, store: ContextStore, record: ContextRecord) -> None:
        self._store, self._record = store, record
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Path:
        store, path = self._store, self._store._path(self._record.owner, self._record.data)
        if store._local:
            if not Path(path).is_file():
                raise NoContextError(f"context {self._record.id} was deleted")
            return Path(path)
        self._folder = tempfile.TemporaryDirectory(prefix="context-")
        try:
            store._fs.get_file(path, f"{self._folder.name}/data")
        except FileNotFoundError:
            self._folder.cleanup()
            raise NoContextError(f"context {self._record.id} was deleted") from None
        return Path(self._folder.name) / "data"

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            self._folder.cleanup()


def _data_name(context_id: str) -> str:
    return f"{context_id}.{secrets.token_hex(8)}.safetensors"
