"""The store of contexts: owned, named, expiring; in a folder and in an object store; tidy after crashes."""

from __future__ import annotations

import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from engine_cases import make_engine, run, submit, text_tokens
from megalodon.inference import PrefixStore, context_store, save_snapshot
from megalodon.inference.context_store import NAMES, ChangedError, ContextStore, NameTakenError, NoContextError

ENGINE = make_engine()


def snapshot_of(length: int):
    return run(ENGINE, submit(ENGINE, text_tokens(1, length), read_only=True, keep=True)).snapshot


@pytest.fixture(params=["folder", "object store"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ContextStore:
    url = str(tmp_path / "contexts") if request.param == "folder" else f"memory://{tmp_path.name}"
    return ContextStore(url, ENGINE.identity)


def contents(store: ContextStore) -> list[str]:
    """The files of owner a, but for those that lead from names to contexts."""
    return [path for path in store._entries("a") if not path.endswith(NAMES)]


def test_round_trip_and_listing(store: ContextStore) -> None:
    records = [store.create("a", snapshot_of(20 + i), f"name {i}", None) for i in range(3)]
    assert [record.id for record in store.owned("a")] == [record.id for record in reversed(records)]
    assert store.count("a") == 3 and store.count("b") == 0 and store.owned("b") == []
    loaded = store.load(store.get("a", "name 1"))
    assert loaded.tokens == 21 and loaded.text_fingerprint == records[1].text
    assert store.get("a", records[1].id) == records[1]
    store.delete("a", records[1].id)
    for key in (records[1].id, "name 1", "../a", "", "x" * 1000):
        with pytest.raises(NoContextError):
            store.get("a", key)
    with pytest.raises(NoContextError):
        store.load(records[1])
    with pytest.raises(NoContextError):
        store.get("b", records[0].id)
    with pytest.raises(ValueError, match="no name for a folder"):
        store.owned("../a")


def test_names_are_unique_per_owner(store: ContextStore) -> None:
    record = store.create("a", snapshot_of(20), "mine", None)
    with pytest.raises(NameTakenError):
        store.create("a", snapshot_of(20), "mine", None)
    store.create("b", snapshot_of(20), "mine", None)
    assert store.update("a", "mine", name="mine").name == "mine"
    assert store.update("a", "mine", name=None).name is None
    for name in ("../x", "a/b", ".hidden", "", record.id):
        with pytest.raises(ValueError, match="name"):
            store.update("a", record.id, name=name)
    assert store.count("a") == 1


def test_extending_replaces_and_notices_changes(store: ContextStore) -> None:
    record = store.create("a", snapshot_of(20), "mine", None)
    longer = store.extend("a", record.id, snapshot_of(50), record)
    assert (longer.id, longer.name, longer.tokens) == (record.id, "mine", 50)
    with pytest.raises(ChangedError):
        store.extend("a", record.id, snapshot_of(60), record)
    assert store.load(store.get("a", "mine")).tokens == 50
    with pytest.raises(NoContextError):
        store.load(record)
    store.delete("a", record.id)
    with pytest.raises(ChangedError):
        store.extend("a", record.id, snapshot_of(60), longer)
    assert store.count("a") == 0 and not contents(store)


def test_expired_contexts_are_gone_and_swept(store: ContextStore) -> None:
    record = store.create("a", snapshot_of(20), "soon", time.time() + 0.05)
    store.create("a", snapshot_of(20), "later", time.time() + 1000)
    time.sleep(0.06)
    with pytest.raises(NoContextError):
        store.get("a", record.id)
    store.sweep()
    assert len(contents(store)) == 2 and [one.name for one in store.owned("a")] == ["later"]
    dying = store.create("a", snapshot_of(20), None, time.time() + 0.05)
    time.sleep(0.06)
    with pytest.raises(ChangedError, match="expired"):
        store.extend("a", dying.id, snapshot_of(50), dying)


def test_what_a_crash_leaves_is_swept(store: ContextStore, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = store.create("a", snapshot_of(20), "kept", None)

    def fail(_: object) -> None:
        raise OSError(28, "disk full")

    monkeypatch.setattr(store, "_write_record", fail)
    with pytest.raises(OSError, match="disk full"):
        store.create("a", snapshot_of(20), "lost", None)
    assert len(contents(store)) == 2, "a failed write leaves nothing"
    store._fs.pipe_file(store._path("a", "ctx_0.orphan.safetensors"), b"half a file")
    store.sweep()
    assert len(contents(store)) == 3, "it may just be being written"
    monkeypatch.setattr(context_store, "ORPHAN_SECONDS", -1.0)
    store.sweep()
    assert len(contents(store)) == 2 and store.load(kept).tokens == 20


def test_export_and_import(store: ContextStore, tmp_path: Path) -> None:
    record = store.create("a", snapshot_of(40), None, None)
    with store.file(record) as path:
        copy = tmp_path / "copy"
        copy.write_bytes(path.read_bytes())
    imported = store.import_file("b", copy, "from a", None)
    assert imported.text == record.text and store.load(imported).tokens == 40
    copy.write_bytes(copy.read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged"):
        store.import_file("b", copy, None, None)
    assert store.count("b") == 1


def test_an_imported_state_is_no_proof_of_its_text() -> None:
    """A forged file that names a text it never read must not get into the cache of those who read that text."""
    engine = make_engine(prefixes=lambda identity: PrefixStore(identity, 1 << 24), share_prefixes=True)
    store = ContextStore("memory://forged", engine.identity)
    text = text_tokens(1, 60)
    honest, other = (
        run(engine, submit(engine, tokens[:17], read_only=True, keep=True, owner=owner)).snapshot
        for owner, tokens in (("a", text), ("b", text_tokens(2, 60)))
    )
    with tempfile.TemporaryDirectory() as folder:
        forged = Path(folder) / "forged"
        save_snapshot(forged, replace(honest, state=other.state), engine.identity)
        record = store.import_file("b", forged, None, None)
    engine.prefixes = PrefixStore(engine.identity, 1 << 24)
    start = store.load(record)
    run(engine, submit(engine, text[17:], start, read_only=True, keep=True, owner="b"))
    victim = run(engine, submit(engine, text, max_tokens=10, owner="a"))
    plain = make_engine()
    assert victim.tokens() == run(plain, submit(plain, text, max_tokens=10)).tokens()


def test_a_damaged_record_is_passed_over_and_its_data_kept(
    store: ContextStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, damaged = (store.create("a", snapshot_of(20), name, None) for name in ("kept", "damaged"))
    path = store._path("a", f"{damaged.id}.json")
    whole = store._fs.cat_file(path)
    monkeypatch.setattr(context_store, "ORPHAN_SECONDS", -1.0)
    for spoilt in (b"", b"{", b"[]", b"{}", b'{"id": 1}', b"\xff"):
        store._fs.pipe_file(path, spoilt)
        store.sweep()
        assert store.owned("a") == [kept]
        with pytest.raises(NoContextError):
            store.get("a", damaged.id)
    store._fs.pipe_file(path, whole)
    assert store.load(store.get("a", "damaged")).tokens == 20


def test_many_at_once(store: ContextStore) -> None:
    snapshot, refused = snapshot_of(20), []

    def work(i: int) -> None:
        try:
            store.create("a", snapshot, "the one", None)
        except NameTakenError:
            refused.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 7 and store.count("a") == 1 and len(contents(store)) == 2


def test_a_name_is_found_without_reading_other_records(store: ContextStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(4):
        store.create("a", snapshot_of(20), f"name {i}", None)
    store.get("a", "name 0")
    read: list[str] = []
    whole = store._record
    monkeypatch.setattr(store, "_record", lambda owner, one: (read.append(one), whole(owner, one))[1])
    wanted = store.get("a", "name 2")
    with pytest.raises(NoContextError):
        store.get("a", "unknown")
    assert read == [wanted.id]
    store.create("a", snapshot_of(20), "new", None)
    assert read == [wanted.id], "nor to see that a name is free"
    renamed = store.update("a", "name 2", name="other")
    assert store.get("a", "other") == renamed and store.create("a", snapshot_of(20), "name 2", None).id != wanted.id
    store.delete("a", "other")
    with pytest.raises(NoContextError):
        store.get("a", "other")


def test_names_outlive_crashes_and_older_stores(store: ContextStore, monkeypatch: pytest.MonkeyPatch) -> None:
    record = store.create("a", snapshot_of(20), "old", None)
    write = store._write

    def crash(path: str, text: str) -> None:
        if path.endswith(".json"):
            raise KeyboardInterrupt
        write(path, text)

    monkeypatch.setattr(store, "_write", crash)
    with pytest.raises(KeyboardInterrupt):
        store.update("a", "old", name="new")
    monkeypatch.undo()
    assert store.get("a", "old") == record, "the name is that of the record"
    with pytest.raises(NoContextError):
        store.get("a", "new")
    other = store.create("a", snapshot_of(20), "new", None)
    assert store.get("a", "new") == other
    for path in store._entries("a"):  # as contexts were kept before names had files
        if path.endswith(NAMES):
            store._fs.rm_file(path)
    later = ContextStore.__new__(ContextStore)
    later.__dict__.update(vars(store) | {"_indexed": set()})
    assert later.get("a", "old") == record and later.get("a", "new") == other
    with pytest.raises(NameTakenError):
        later.create("a", snapshot_of(20), "old", None)


def test_scratch_files_lie_beside_the_contexts_and_are_swept(
    store: ContextStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with store.temporary() as path:
        path.write_bytes(b"half an import")
        assert not store._local or path.is_relative_to(tmp_path / "contexts")
        store.sweep()
        assert path.exists(), "somebody may be writing to it"
        monkeypatch.setattr(context_store, "ORPHAN_SECONDS", -1.0)
        store.sweep()
        assert not path.exists() and not list(store.scratch.iterdir())
    assert store._folders() == []


def test_unknown_protocols_are_refused() -> None:
    with pytest.raises(ValueError, match="nonsense"):
        ContextStore("nonsense://x", ENGINE.identity)
    assert "memory" in fsspec.available_protocols()
