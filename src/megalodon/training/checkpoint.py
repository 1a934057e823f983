"""Checkpoint folders: complete or absent, verified before they are trusted, the last few kept.

A checkpoint is a folder `step-000123` of safetensors and JSON files with a manifest of every file's size and SHA-256.
It is made under a hidden temporary name and renamed when all of it is on the disk, so that a folder with a checkpoint's
name was once whole; the manifest shows whether it still is. What the files hold is the caller's affair (snapshot.py).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Literal

from megalodon.files import require_free_space, save_json, sha256, write_folder

MANIFEST = "manifest.json"
MARGIN = 4 * 2**20  # bytes that must stay free beside the tensors, for the JSON files, the tokenizer and the metrics

ResumeMode = Literal["auto", "previous", "never"]


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or belongs to another run."""


def checkpoint_name(step: int) -> str:
    """The folder's name for a step."""
    return f"step-{step:06d}"


def checkpoint_step(folder: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(folder.name.removeprefix("step-"))


def list_checkpoints(root: Path) -> list[Path]:
    """The checkpoint folders under `root`, oldest first, damaged ones included."""
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if re.fullmatch(r"step-\d+", path.name)), key=checkpoint_step)


def save_checkpoint(root: Path, step: int, tensor_bytes: int, fill: Callable[[Path], None]) -> Path:
    """Make the checkpoint of `step` under `root` and return its folder. A damaged one of that step is replaced.

    Args:
        tensor_bytes: what the tensors will take, checked against the free disk before anything is written.
        fill: writes the files into the folder it is given.

    Raises:
        OSError: naming the checkpoint, if the disk is full or refuses; earlier checkpoints are as they were.
    """
    target = root / checkpoint_name(step)

    def write(folder: Path) -> None:
        fill(folder)
        write_manifest(folder, step)

    try:
        root.mkdir(parents=True, exist_ok=True)
        require_free_space(root, tensor_bytes + MARGIN)
        write_folder(target, write)
    except OSError as error:
        raise OSError(error.errno, f"cannot save checkpoint {target.name}: {error.strerror}", str(root)) from error
    return target


def write_manifest(folder: Path, step: int) -> None:
    """List every file of a checkpoint that is otherwise complete."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files
    }
    save_json(folder / MANIFEST, {"format": 1, "step": step, "files": listed})


def find_damage(folder: Path) -> str | None:
    """Check every file against the manifest: one sentence naming the first damaged one, or None if all are good."""
    manifest = folder / MANIFEST
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        expected = [(folder / name, entry["bytes"], entry["sha256"]) for name, entry in files.items()]
    except FileNotFoundError:
        return f"{manifest} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{manifest} is damaged: it does not list the checkpoint's files"
    for path, size, checksum in expected:
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} is truncated or altered: it has {path.stat().st_size} bytes, its manifest says {size}"
        if sha256(path) != checksum:
            return f"{path} is corrupt: its SHA-256 is not the one in its manifest"
    return None


def choose_checkpoint(root: Path, mode: ResumeMode) -> Path | None:
    """The checkpoint to continue from, whole: the newest; None if there is none.

    With mode `previous`, damaged checkpoints newer than the newest good one are set aside (renamed `*.damaged`).

    Raises:
        CheckpointError: naming the damaged file and the newest good checkpoint, unless mode is `previous`.
    """
    found = list_checkpoints(root)
    damaged: list[tuple[Path, str]] = []
    good = None
    for folder in reversed(found):
        damage = find_damage(folder)
        if damage is None:
            good = folder
            break
        damaged.append((folder, damage))
    if damaged and (mode != "previous" or good is None):
        advice = (
            f"the newest good checkpoint is {good.name}: continue from it with run.resume=previous"
            if good
            else "there is no good checkpoint before it: start anew in another run.folder"
        )
        raise CheckpointError(f"checkpoint {damaged[0][0].name} cannot be used: {damaged[0][1]}; {advice}")
    for folder, _ in damaged:
        aside = folder.with_name(f"{folder.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    return good


def prune_checkpoints(root: Path, keep: int, also: Collection[int] = ()) -> None:
    """Remove all but the last `keep` checkpoints and those of the steps in `also`."""
    for folder in list_checkpoints(root)[:-keep]:
        if checkpoint_step(folder) not in also:
            # Renamed first, so that a kill in the middle of the removal does not leave half a checkpoint by that name.
            doomed = folder.with_name(f".{folder.name}.partial-removed")
            folder.rename(doomed)
            shutil.rmtree(doomed)
