"""Atomic writing: the target is the old one or the new one, whatever goes wrong."""

from __future__ import annotations

import errno
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from megalodon import files


def test_write_text_replaces_whole(tmp_path):
    target = tmp_path / "config.yaml"
    files.write_text(target, "old")
    files.write_text(target, "néw")
    assert target.read_text(encoding="utf-8") == "néw"
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "a"
    files.write_text(target, "old")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        files.write_file(target, fail)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_two_threads_write_one_file_at_once(tmp_path):
    both = threading.Barrier(2, timeout=600)

    def write(text: str) -> None:
        def fill(path: Path) -> None:
            path.write_text(text)
            both.wait()

        files.write_file(tmp_path / "a", fill)

    with ThreadPoolExecutor() as pool:
        assert list(pool.map(write, ["one", "two"])) == [None, None]
    assert [path.read_text() in ("one", "two") for path in tmp_path.iterdir()] == [True]


def test_failed_folder_leaves_the_old_one(tmp_path):
    target = tmp_path / "model"
    files.write_folder(target, lambda folder: files.save_json(folder / "a.json", 1))

    def fail(folder: Path) -> None:
        (folder / "a.json").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_folder(target, fail)
    assert (target / "a.json").read_text() == "1\n"
    assert list(tmp_path.iterdir()) == [target]


def test_folder_is_replaced(tmp_path):
    target = tmp_path / "model"
    files.write_folder(target, lambda folder: files.save_json(folder / "a.json", 1))
    files.write_folder(target, lambda folder: files.save_json(folder / "b.json", 2))
    assert [path.name for path in target.iterdir()] == ["b.json"]
    assert list(tmp_path.iterdir()) == [target]


def test_remove_partial_takes_only_partial(tmp_path):
    (tmp_path / "step-000001").mkdir()
    (tmp_path / ".step-000002.partial-77").mkdir()
    (tmp_path / ".loss.png.partial-77").touch()
    files.remove_partial(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_tensors_round_trip(tmp_path):
    tensors = {"a": torch.randn(3, 4).t(), "b": torch.tensor(7)}
    files.save_tensors(tmp_path / "t.safetensors", tensors)
    loaded = files.load_tensors(tmp_path / "t.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    "text", ["I/O error: No space left (os error 28)", "IoError(Os { code: 28, kind: StorageFull })"]
)
def test_a_full_disk_is_an_ordinary_oserror(tmp_path, monkeypatch, text):
    def full(*args, **kwargs):
        raise SafetensorError(text)

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="No space left") as caught:
        files.save_tensors(tmp_path / "t.safetensors", {"a": torch.zeros(1)})
    assert caught.value.errno == errno.ENOSPC


def test_safetensors_tells_the_systems_error(tmp_path):
    with pytest.raises(OSError) as caught:
        files.save_tensors(tmp_path / "absent" / "t.safetensors", {"a": torch.zeros(1)})
    assert caught.value.errno == errno.ENOENT


def test_truncated_tensors_are_named(tmp_path):
    path = tmp_path / "t.safetensors"
    files.save_tensors(path, {"a": torch.zeros(100)})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"t\.safetensors is not a whole"):
        files.load_tensors(path)


def test_free_space_is_checked(tmp_path):
    files.require_free_space(tmp_path, 1)
    with pytest.raises(OSError, match="are free") as caught:
        files.require_free_space(tmp_path, 10**18)
    assert caught.value.errno == errno.ENOSPC


def test_no_two_test_files_have_one_name() -> None:
    """pytest imports a test file by its name alone, where folders are no packages: the second would hide."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
