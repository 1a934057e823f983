"""Which implementation of an operator runs: decided here and nowhere else.

The order of precedence is the `backend=` argument, then the environment variable `MEGALODON_BACKEND`, then `blocked`.
The Triton kernels must be asked for: they are proved in Triton's interpreter and compiled ahead of time, but no default
rests on them before their `gpu` tests have passed on a device.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from megalodon.ops import compiled

ENVIRONMENT_VARIABLE = "MEGALODON_BACKEND"

KERNEL_DTYPES = (torch.bfloat16, torch.float32)
"""Activation dtypes that the Triton kernels take; float64 and float16 go through the blocked forms."""

Implementations = Mapping[str, Callable[..., Any]]


def _triton_version() -> str | None:
    """The installed one's, which other distributions than `triton` may bring; without importing it, if possible."""
    if find_spec("triton") is None:
        return None
    try:
        return version("triton")
    except PackageNotFoundError:
        import triton

        return str(triton.__version__)


TRITON_VERSION = _triton_version()

OLDEST_TRITON = "3.5"
"""Earlier ones refuse products as small as CEMA's. PyTorch 2.9 brings it."""


def _is_too_old(installed: str) -> bool:
    numbers, oldest = ([int(part) for part in text.split(".")[:2]] for text in (installed, OLDEST_TRITON))
    return numbers < oldest


def without_kernels(device_type: str, index: int | None = None) -> str | None:
    """Why the Triton kernels cannot run on a device; None where they can."""
    if TRITON_VERSION is None:
        return "Triton is not installed"
    if _is_too_old(TRITON_VERSION):
        return f"Triton {TRITON_VERSION} is too old: they need {OLDEST_TRITON}, which PyTorch 2.9 brings"
    if device_type == "cpu":
        return None if os.environ.get("TRITON_INTERPRET") == "1" else "a CPU runs them with TRITON_INTERPRET=1 only"
    if device_type != "cuda":
        return f"they are written for NVIDIA GPUs, not for a device of type {device_type}"
    if torch.version.hip is not None:
        return "they are written for NVIDIA GPUs"
    if torch.cuda.get_device_capability(index) < (8, 0):
        return "they need compute capability 8.0"
    return None


def default_backend(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str:
    """The form for a device and dtype unless one is named: plain PyTorch, which runs everywhere, or compiled loops on a
    CPU that has what they need."""
    if device.type != "cpu" or dtype not in KERNEL_DTYPES or torch.compiler.is_compiling():
        return "blocked"
    return "numba" if compiled.missing() is None else "blocked"


def backend_for(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """(the back end where a caller names none, what decided it: the environment variable or "default")."""
    if name := os.environ.get(ENVIRONMENT_VARIABLE):
        return name, ENVIRONMENT_VARIABLE
    return default_backend(device, dtype), "default"


def compiles(x: Tensor, *kernels: str, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> bool:
    """Whether these kernels of `ops.compiled` run on x: there is something in it, and nobody names another back end."""
    if x.device.type != "cpu" or x.dtype not in dtypes or not x.numel() or torch.compiler.is_compiling():
        return False
    return backend_for(x.device, x.dtype)[0] == "numba" and all(compiled.kernel(name) is not None for name in kernels)


@contextmanager
def default_backends() -> Iterator[None]:
    """The defaults, whatever the environment variable asks for: for work on another device than the caller's."""
    asked = os.environ.pop(ENVIRONMENT_VARIABLE, None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ[ENVIRONMENT_VARIABLE] = asked


def check_devices(device: torch.device, **others: Tensor | None) -> None:
    """That every tensor given by name is on `device`, where the activations are.

    Raises:
        ValueError: one is elsewhere; the message names it.
    """
    for name, value in others.items():
        if value is not None and value.device != device:
            raise ValueError(f"{name} is on {value.device}: the activations are on {device}, and so must it be")


def choose(
    implementations: Implementations, backend: str | None, device: torch.device, dtype: torch.dtype
) -> Callable[..., Any]:
    """The implementation to call.

    Args:
        implementations: those of the operator, by name.
        backend: the caller's choice; None leaves it to the environment variable and the default.
        device, dtype: of the activations.

    Raises:
        ValueError: `backend` or the environment variable names none of the operator's implementations, or one that
            does not run on this device or in this dtype.
    """
    name, source = (backend, "backend") if backend is not None else backend_for(device, dtype)
    if name in ("numba", "triton") and source != "backend" and name not in implementations:
        name = "blocked"  # asked of all operators at once, of which not every one has it
    if name not in implementations:
        raise ValueError(
            f"{source}={name!r} is not a back end of this operator: choose from {', '.join(implementations)}"
        )
    if name == "numba" and source != "default" and (reason := compiled.absent()):
        raise ValueError(f"{source}={name!r} cannot run here: {reason}; 'blocked' runs everywhere")
    if name.startswith("triton"):
        if reason := without_kernels(device.type, device.index):
            raise ValueError(f"{source}={name!r} cannot run here: {reason}; 'blocked' runs everywhere")
        if dtype not in KERNEL_DTYPES:
            raise ValueError(f"{source}={name!r} takes bfloat16 and float32, not {dtype}: use 'blocked' for it")
    return implementations[name]


@cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has bfloat16 matrix instructions; PyTorch emulates them at a few per cent of the speed."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which an operator multiplies matrices made from `x`."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and not cpu_multiplies_bfloat16():
        return torch.float32
    return x.dtype


def full_precision(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything below: the dtype of coefficients, statistics and states."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def complex_of(dtype: torch.dtype) -> torch.dtype:
    """The complex dtype whose parts are float32 or float64 numbers."""
    return torch.complex128 if dtype == torch.float64 else torch.complex64


def accumulator_dtype(device: torch.device) -> torch.dtype:
    """The dtype for sums over millions of tokens: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64
