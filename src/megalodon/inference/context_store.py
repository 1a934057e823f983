"""Contexts that live on disk: named, owned, expiring; a folder or any store that fsspec knows.

A context is a data file (`snapshot_file`) and a small record that names it. The data file is written first and the
record put in place last, so a crash leaves the context as it was, or as it should be. Extending writes a new data file
and replaces the record. Files are named by owner and id alone, both checked; what users type never becomes a path.

A name is found by a file called after its hash, which holds the context's id. It is written before the record and
removed after it, and counts only while the record has the name: so whatever a crash leaves, it is never wrong.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import secrets
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
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
NAMES = ".name"
"""Ends the files that lead from a name to a context; of the one that says that all names have theirs, it is all."""
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
        note: whatever its maker wants to know of it later, or None.
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
    note: str | None = None


class ContextStore:
    """All contexts of a server, or of several that share a folder or bucket.

    Attributes:
        scratch: where files lie while they are being received or fetched: on the contexts' own disk, or for a bucket
            in the folder of $TMPDIR, else /var/tmp. `sweep` removes what a crash left there.
    """

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
        self.scratch = Path(self._root) / ".scratch" if self._local else _scratch_of(url)
        self._lock = threading.RLock()
        self._indexed: set[str] = set()

    # --- records ----------------------------------------------------------------------------------------------------

    def owned(self, owner: str) -> list[ContextRecord]:
        """The owner's contexts, newest first. Expired ones are removed on the way."""
        now = time.time()
        found = []
        for record in self._records(owner):
            if record.expires is not None and record.expires <= now:
                self._remove_expired(record)
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
        elif NAME.fullmatch(key) and (record := self._named(owner, key)) is not None:
            return record
        raise NoContextError(f"no context {key[:80]!r}")

    def check_name(self, owner: str, name: str) -> None:
        """See whether a new context may have this name.

        Raises:
            NameTakenError: if the owner has a context of this name.
            ValueError: if it is no name.
        """
        self._check_name(owner, name, None)

    def update(self, owner: str, key: str, **changes: str | float | None) -> ContextRecord:
        """Change a context's `name` or `expires`."""
        with self._lock:
            record = self.get(owner, key)
            self._check_name(owner, changes.get("name"), record.id)
            changed = replace(record, **changes, changed=time.time())  # type: ignore[arg-type]
            self._point_to(changed)
            self._write_record(changed)
            if record.name != changed.name:
                self._forget_name(record)
        return changed

    def delete(self, owner: str, key: str) -> None:
        """Remove a context for good."""
        self._remove(self.get(owner, key))

    # --- contents ---------------------------------------------------------------------------------------------------

    def create(
        self,
        owner: str,
        snapshot: Snapshot,
        name: str | None,
        expires: float | None,
        parent: str | None = None,
        note: str | None = None,
    ) -> ContextRecord:
        """Save a snapshot as a new context.

        Raises:
            NameTakenError: if the owner has a context of this name.
            OSError: if it cannot be written; nothing is left behind.
        """
        return self._publish(replace(self._new_record(owner, name, expires, parent), note=note), snapshot)

    def extend(self, owner: str, key: str, snapshot: Snapshot, since: ContextRecord) -> ContextRecord:
        """Replace what a context holds; its name and expiry stay what they are by now.

        Raises:
            ChangedError: if it no longer holds what `since` did, which the snapshot was made from, or has expired.
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
        """Remove expired contexts, and files that a crash left without a record; see to it that names are found."""
        for file in self.scratch.iterdir() if self.scratch.is_dir() else ():
            with suppress(OSError):  # somebody is done with it meanwhile
                if time.time() - file.stat().st_mtime > ORPHAN_SECONDS:
                    file.unlink()
        for folder in self._folders():
            for record in self._records(folder):
                if record.expires is not None and record.expires <= time.time():
                    self._remove(record)
            self._index(folder, again=True)
            records, paths = list(self._records(folder)), self._entries(folder)
            names = [path.rsplit("/", 1)[-1] for path in paths]
            spared = {record.data for record in records} | {NAMES}
            spared |= {_name_file(record.name) for record in records if record.name is not None}
            unreadable = {name.removesuffix(".json") for name in names} - {record.id for record in records}
            for path, name in zip(paths, names, strict=True):
                orphan = name not in spared and name.split(".")[0] not in unreadable
                orphan = orphan and not (unreadable and name.endswith(NAMES))
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
                    self._point_to(record)
                else:
                    now = self._record(record.owner, record.id)
                    if now is None or now.data != since.data:
                        raise ChangedError(f"context {record.id} was changed or deleted meanwhile: read it again")
                    if now.expires is not None and now.expires <= time.time():
                        raise ChangedError(f"context {record.id} has expired meanwhile: read it again")
                    record = replace(record, name=now.name, expires=now.expires)
                self._write_record(record)
        except BaseException:
            with suppress(OSError):
                self._fs.rm_file(target)
            if since is None:
                self._forget_name(record)
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
        with self.temporary() as path:
            save_snapshot(path, snapshot, self.identity)
            self._fs.put_file(str(path), target)
            return path.stat().st_size

    @contextmanager
    def temporary(self) -> Iterator[Path]:
        """The path of a file in `scratch` that is gone after the `with` block."""
        self.scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self.scratch / secrets.token_hex(12)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _write_record(self, record: ContextRecord) -> None:
        self._write(self._path(record.owner, f"{record.id}.json"), json.dumps(asdict(record)))

    def _write(self, path: str, text: str) -> None:
        if self._local:
            write_text(Path(path), text)
        else:
            self._fs.pipe_file(path, text.encode())

    # --- names ------------------------------------------------------------------------------------------------------

    def _named(self, owner: str, name: str) -> ContextRecord | None:
        """The owner's context of this name, if it has not expired."""
        self._index(owner)
        context_id = self._pointed_to(owner, name)
        record = None if context_id is None else self._record(owner, context_id)
        if record is None or record.name != name:
            return None
        if record.expires is not None and record.expires <= time.time():
            self._remove_expired(record)
            return None
        return record

    def _pointed_to(self, owner: str, name: str) -> str | None:
        try:
            context_id = self._fs.cat_file(self._path(owner, _name_file(name))).decode(errors="replace").strip()
        except FileNotFoundError:
            return None
        return context_id if ID.fullmatch(context_id) else None

    def _point_to(self, record: ContextRecord) -> None:
        if record.name is not None:
            self._write(self._path(record.owner, _name_file(record.name)), record.id)

    def _forget_name(self, record: ContextRecord) -> None:
        if record.name is None:
            return
        with self._lock, suppress(FileNotFoundError):
            if self._pointed_to(record.owner, record.name) == record.id:
                self._fs.rm_file(self._path(record.owner, _name_file(record.name)))

    def _index(self, owner: str, again: bool = False) -> None:
        """Give every name its file, if that was not done yet: contexts may be older than these files are."""
        marker = self._path(owner, NAMES)
        if not again and (owner in self._indexed or self._fs.exists(marker)):
            self._indexed.add(owner)
            return
        records = list(self._records(owner))
        try:
            for record in records:
                if record.name is not None and self._pointed_to(owner, record.name) is None:
                    self._point_to(record)
            if records and owner not in self._indexed:
                self._write(marker, "")
                self._indexed.add(owner)
        except OSError as error:
            if not is_read_only(error):
                raise

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
        self._forget_name(record)

    def _remove_expired(self, record: ContextRecord) -> None:
        """Remove a context on the way, if the place lets us: whoever reads need not be able to write."""
        with suppress(OSError):
            self._remove(record)

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
        holder = self._named(owner, str(name))
        if holder is not None and holder.id != own:
            raise NameTakenError(f"there is a context named {name!r} already")


class _Fetched:
    """The data file of a record as a local path, for the length of a `with` block."""

    def __init__(self, store: ContextStore, record: ContextRecord) -> None:
        self._store, self._record, self._held = store, record, ExitStack()

    def __enter__(self) -> Path:
        store, path = self._store, self._store._path(self._record.owner, self._record.data)
        if store._local:
            if not Path(path).is_file():
                raise NoContextError(f"context {self._record.id} was deleted")
            return Path(path)
        with ExitStack() as held:
            copy = held.enter_context(store.temporary())
            try:
                store._fs.get_file(path, str(copy))
            except FileNotFoundError:
                raise NoContextError(f"context {self._record.id} was deleted") from None
            self._held = held.pop_all()
        return copy

    def __exit__(self, *_: object) -> None:
        self._held.close()


def is_read_only(error: OSError) -> bool:
    """Whether the place of contexts refuses to be written to."""
    return error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) or isinstance(error, PermissionError)


def _scratch_of(url: str) -> Path:
    """A folder for a store that is no folder itself; /tmp is in memory on many systems."""
    place = Path(os.environ.get("TMPDIR", "/var/tmp"))
    place = place if place.is_dir() else Path(tempfile.gettempdir())
    return place / f"megalodon-{os.getuid()}-{hashlib.sha256(url.encode()).hexdigest()[:16]}"


def _name_file(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:32] + NAMES


def _data_name(context_id: str) -> str:
    return f"{context_id}.{secrets.token_hex(8)}.safetensors"
