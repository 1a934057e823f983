"""Which implementation of an operator runs: decided here and nowhere else.

The order of precedence is the `backend=` argument, then the environment variable `MEGALODON_BACKEND`, then the fastest
form that the device and dtype allow.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

ENVIRONMENT_VARIABLE = "MEGALODON_BACKEND"

Implementations = Mapping[str, Callable[..., Any]]


def default_backend(device: torch.device) -> str:
    """The fastest form for a device type. `blocked` is plain PyTorch and runs everywhere."""
    return "blocked"


def choose(implementations: Implementations, backend: str | None, device: torch.device) -> Callable[..., Any]:
    """The implementation to call.

    Raises:
        ValueError: `backend` or the environment variable names none of the operator's implementations.
    """
    source, name = "backend", backend
    if name is None:
        source, name = ENVIRONMENT_VARIABLE, os.environ.get(ENVIRONMENT_VARIABLE) or default_backend(device)
    if name not in implementations:
        raise ValueError(
            f"{source}={name!r} is not a back end of this operator: choose from {', '.join(implementations)}"
        )
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


def accumulator_dtype(device: torch.device) -> torch.dtype:
    """The dtype for sums over millions of tokens: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64
