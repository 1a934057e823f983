"""Writing files so that a kill, a crash or a full disk at any instant leaves the old file or the new one, whole."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

PARTIAL = ".partial"  # part of the name of whatever is being written; never read, removed at the next start


def partial_name(target: Path) -> Path:
    """A hidden sibling of `target` to write to before renaming; nobody else's, be it a thread or another machine."""
    return target.with_name(f".{target.name}{PARTIAL}-{secrets.token_hex(6)}")


def sync_file(path: Path) -> None:
    """Return once the file's bytes are on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Return once the folder's entries (names, renames) are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(target: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a file under a temporary name, then put it in the place of `target`.

    Raises:
        OSError: as `write` or the disk says; `target` is then as it was.
    """
    temporary = partial_name(target)
    try:
        with disk_errors(target):
            write(temporary)
            sync_file(temporary)
            temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def write_text(target: Path, text: str) -> None:
    """Write a whole text file at once, UTF-8."""
    write_file(target, lambda path: path.write_bytes(text.encode()))


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Have `fill` make a folder under a temporary name, then put it in the place of `target`, which may exist.

    Raises:
        OSError: as `fill` or the disk says; `target` is then as it was.
    """
    temporary = partial_name(target)
    try:
        with disk_errors(target):
            temporary.mkdir(parents=True)
            fill(temporary)
            publish_folder(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def publish_folder(temporary: Path, target: Path) -> None:
    """Put a folder that is complete in the place of `target`, which may exist, once all of it is on the disk."""
    for path in temporary.rglob("*"):
        sync_folder(path) if path.is_dir() else sync_file(path)
    sync_folder(temporary)
    if target.exists():
        displaced = target.with_name(f".{target.name}{PARTIAL}-old")
        shutil.rmtree(displaced, ignore_errors=True)
        target.rename(displaced)
        temporary.rename(target)
        shutil.rmtree(displaced)
    else:
        temporary.rename(target)
    sync_folder(target.parent)


def remove_partial(folder: Path) -> None:
    """Remove what an interrupted write left in `folder`."""
    for path in folder.glob(f".*{PARTIAL}-*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors.

    Raises:
        OSError: if the disk is full or refuses, with the system's error number, as for any other file.
    """
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with disk_errors(path):
        save_file(contiguous, path, metadata=metadata)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Has what is raised for a full or failing disk, while `path` is written, be an OSError with number and name."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    except Exception as error:
        # The system's error is in the text only: safetensors has "(os error 28)" or "Os { code: 28, ... }" by its
        # version, tokenizers "(os error 28)" in a bare Exception, PyTorch's checkpoints "[Errno 28]".
        code = re.search(r"(?:os error |code: |Errno )(\d+)", str(error))
        if code is None and not isinstance(error, SafetensorError):
            raise
        number = int(code[1]) if code else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error


def is_full(error: OSError) -> bool:
    """Whether there is no room on the disk, or none left to this user."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU.

    Raises:
        ValueError: if it is not a whole safetensors file.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None


def save_json(path: Path, value: Any) -> None:
    """Write JSON for people and programs to read."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_free_space(folder: Path, needed: int) -> None:
    """Check, before work starts, that `needed` bytes fit on the disk that holds `folder`.

    Raises:
        OSError: ENOSPC, naming the folder, what is needed and what is free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"disk full: the checkpoint needs {needed / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free",
            str(folder),
        )
