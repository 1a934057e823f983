"""Checkpoint folders: all or nothing, damage is found and named, the last few are kept."""

from __future__ import annotations

import errno
import shutil

import pytest

from megalodon.training import checkpoint
from megalodon.training.checkpoint import CheckpointError, choose_checkpoint, list_checkpoints, save_checkpoint


def save(root, step, text="x" * 1000):
    def fill(folder):
        (folder / "model").mkdir()
        (folder / "model" / "weights").write_text(text + str(step))
        (folder / "state.json").write_text("{}")

    return save_checkpoint(root, step, 1000, fill)


def names(root):
    return sorted(path.name for path in root.iterdir())


def test_the_newest_is_chosen(tmp_path):
    for step in (5, 10, 1_000_000):
        save(tmp_path, step)
    assert choose_checkpoint(tmp_path, "auto").name == "step-1000000"
    assert [checkpoint.checkpoint_step(folder) for folder in list_checkpoints(tmp_path)] == [5, 10, 1_000_000]


def test_no_checkpoint(tmp_path):
    assert choose_checkpoint(tmp_path / "absent", "auto") is None


def truncate(folder):
    path = folder / "model" / "weights"
    path.write_bytes(path.read_bytes()[:-1])


def flip(folder):
    path = folder / "model" / "weights"
    data = bytearray(path.read_bytes())
    data[500] ^= 1
    path.write_bytes(data)


def remove(folder):
    (folder / "model" / "weights").unlink()


def empty_manifest(folder):
    (folder / "manifest.json").write_text("{}")


def cut_manifest(folder):
    (folder / "manifest.json").write_text('{"files": {"mo')


def no_manifest(folder):
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("harm", "file", "word"),
    [
        (truncate, "model/weights", "truncated"),
        (flip, "model/weights", "corrupt"),
        (remove, "model/weights", "missing"),
        (empty_manifest, "manifest.json", "damaged"),
        (cut_manifest, "manifest.json", "damaged"),
        (no_manifest, "manifest.json", "missing"),
    ],
)
def test_damage_is_named_and_the_previous_offered(tmp_path, harm, file, word):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    harm(newest)
    with pytest.raises(CheckpointError) as caught:
        choose_checkpoint(tmp_path, "auto")
    message = str(caught.value)
    assert str(newest / file) in message
    assert word in message
    assert "step-000001" in message
    assert "run.resume=previous" in message
    assert names(tmp_path) == ["step-000001", "step-000002"]


def test_previous_sets_the_damaged_aside(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    truncate(tmp_path / "step-000002")
    flip(tmp_path / "step-000003")
    assert choose_checkpoint(tmp_path, "previous").name == "step-000001"
    assert names(tmp_path) == ["step-000001", "step-000002.damaged", "step-000003.damaged"]
    assert choose_checkpoint(tmp_path, "auto").name == "step-000001"


@pytest.mark.parametrize("mode", ["auto", "previous"])
def test_nothing_good_left(tmp_path, mode):
    truncate(save(tmp_path, 1))
    with pytest.raises(CheckpointError, match="no good checkpoint"):
        choose_checkpoint(tmp_path, mode)


def test_full_disk_leaves_earlier_checkpoints_and_nothing_else(tmp_path):
    save(tmp_path, 1)

    def fill(folder):
        (folder / "weights").write_text("half of i")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="cannot save checkpoint step-000002: No space left") as caught:
        save_checkpoint(tmp_path, 2, 1000, fill)
    assert caught.value.errno == errno.ENOSPC
    assert names(tmp_path) == ["step-000001"]
    assert choose_checkpoint(tmp_path, "auto").name == "step-000001"


def test_free_space_is_checked_before_writing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(OSError, match="are free"):
        save_checkpoint(tmp_path, 2, 1000, lambda folder: pytest.fail("wrote without room"))
    assert names(tmp_path) == []


def test_a_damaged_checkpoint_is_replaced(tmp_path):
    truncate(save(tmp_path, 1))
    save(tmp_path, 1)
    assert choose_checkpoint(tmp_path, "auto").name == "step-000001"
    assert names(tmp_path) == ["step-000001"]


def test_pruning_keeps_the_last_and_the_best(tmp_path):
    for step in range(1, 7):
        save(tmp_path, step)
    checkpoint.prune_checkpoints(tmp_path, keep=2, also={3})
    assert names(tmp_path) == ["step-000003", "step-000005", "step-000006"]
