"""A disk that fills up at whatever file: one line that says what to do, whole checkpoints, and the run goes on."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest
from test_resume import train

from megalodon import files
from megalodon.cli import main
from megalodon.training import checkpoint, launch
from megalodon.training.checkpoint import find_damage, list_checkpoints


@pytest.fixture
def disk(tmp_path):
    """Mounts a file system of so many KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = []

    def mount(size: int):
        options = ["-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(place)]
        if os.geteuid() != 0 or subprocess.run(["mount", *options], capture_output=True, check=False).returncode:
            pytest.skip("needs the right to mount a file system")
        mounted.append(place)
        return place

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("size", [8, 16, 150, 400, 700, 900])
def test_the_run_folder_is_full(tiny, disk, size, monkeypatch):
    monkeypatch.setattr(launch, "measure_peak_flops", lambda device, dtype: 1e9)
    monkeypatch.setattr(checkpoint, "require_free_space", lambda folder, needed: None)  # so that writing fails
    tiny["run"] |= {"folder": str(disk(size) / "run"), "steps": 8}
    with pytest.raises(OSError) as caught:
        train(tiny)
    assert caught.value.errno == errno.ENOSPC
    message = str(caught.value)
    assert "free some space and give the same command again: it goes on from" in message and "\n" not in message
    kept = list_checkpoints(Path(tiny["run"]["folder"]) / "checkpoints")
    assert all(find_damage(folder) is None for folder in kept)


@pytest.mark.parametrize("size", [4, 8, 12])
def test_the_cache_is_full(tiny, disk, size, monkeypatch):
    monkeypatch.setattr(launch, "measure_peak_flops", lambda device, dtype: 1e9)
    tiny["data"]["cache_folder"] = str(disk(size) / "cache")
    with pytest.raises(OSError, match="disk full while writing the token cache; free space") as caught:
        train(tiny)
    assert caught.value.errno == errno.ENOSPC and "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [4, 16, 64])
def test_a_tokenizer_and_reports_are_one_line_too(tmp_path, disk, size, capsys):
    (tmp_path / "a.txt").write_text(" ".join(f"word{i} {i * 7919}" for i in range(3000)))
    place = disk(size)
    with pytest.raises(SystemExit) as end:
        main(["tokenizer", str(tmp_path / "a.txt"), str(place / "out"), "--vocab-size", "3000"])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1, error
    assert "No space left on device" in error and "free some space" in error and str(place) in error


@pytest.mark.parametrize("name", ["write_file", "write_folder"])
def test_the_file_is_named_where_the_system_does_not(tmp_path, name):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: .*thing") as caught:
        getattr(files, name)(tmp_path / "thing", full)
    assert caught.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())
