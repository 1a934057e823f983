"""Kernels for a CPU, compiled by Numba when they are first needed and kept on disk.

Numba is optional, and imported here alone and late: a process that needs no kernel does not pay for it. Where kernels
cannot be had, callers take the blocked forms, and one line of the log says why.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch

from megalodon.ops.compiled import threads

_log = logging.getLogger("megalodon")

_FAILED: list[str] = []
"""Why kernels cannot be had after all, once compiling them was tried."""


def _missing() -> str | None:
    if find_spec("numba") is None:
        return "Numba is not installed (pip install 'megalodon-lm[cpu]')"
    if platform.machine().lower() in ("x86_64", "amd64") and not torch.cpu._is_avx2_supported():
        return "this CPU has no AVX2"
    if threads.pool() is None:
        return "PyTorch does not use GNU's OpenMP here, nor one compatible with it"
    return None


_MISSING = _missing()


def absent() -> str | None:
    """Why no kernel can be compiled for this process, as one knows without trying."""
    return _MISSING


def missing() -> str | None:
    """Why no kernel can run in this process; None where they can, as far as one knows before compiling one."""
    return _FAILED[0] if _FAILED else _MISSING


def address(name: str) -> int | None:
    """Where the kernel of this name, `module.function`, lies; None, after one warning, if it cannot be had."""
    if missing() is not None:
        return None
    try:
        return _address(name)
    except Exception as error:  # whatever a compiler, a cache or a linker may come upon
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        _FAILED.append(f"Numba cannot compile here: {first}")
        _log.warning("%s; PyTorch's own operators are used instead", _FAILED[0])
        return None


@cache
def kernel(name: str) -> threads.Kernel | None:
    """The kernel of this name, ready to be called; None if it cannot be had."""
    found = address(name)
    return None if found is None else threads.Kernel(found)


@cache
def _address(name: str) -> int:
    from importlib import import_module

    import numba
    from numba.core import config as numba_config
    from numba.core import types

    config: Any = numba_config
    folder = cache_folder(numba.__version__)
    _check_writable(folder)
    if config.DISABLE_JIT:
        raise RuntimeError("NUMBA_DISABLE_JIT is set")
    module, function = name.split(".")
    kernel: Any = getattr(import_module(f"megalodon.ops.compiled.{module}"), function)

    def compile_kernel() -> Any:
        make = numba.cfunc(
            types.void(types.CPointer(types.int64)), cache=True, error_model="numpy", fastmath={"contract"}
        )
        return make(kernel.py_func)

    before, config.CACHE_DIR = config.CACHE_DIR, str(folder)
    try:
        compiled = compile_kernel()
    except (EOFError, UnpicklingError):  # a full disk, or a machine that went down, has left half a file
        for kept in folder.rglob("*.nb[ci]"):
            kept.unlink(missing_ok=True)
        compiled = compile_kernel()
    finally:
        config.CACHE_DIR = before
    _KEPT.append(compiled)
    return cast(int, compiled.address)


_KEPT: list[Any] = []


def cache_folder(version: str) -> Path:
    """Where compiled code is kept: under `NUMBA_CACHE_DIR`, or the user's cache.

    Numba looks at one source file alone to tell whether code is still good. So each state of ours has its own folder.
    """
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(version.encode())
    for source in sources:
        digest.update(source.read_bytes())
    base = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "megalodon" / digest.hexdigest()[:16]


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("it is read-only")
    except OSError as error:
        raise RuntimeError(f"{folder} cannot be written ({error}): name another in NUMBA_CACHE_DIR") from None
