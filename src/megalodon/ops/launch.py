"""What every launch of a Triton kernel shares."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Makes the device of `x` the current one: Triton launches there, whichever device that is."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def capability(x: Tensor) -> tuple[int, int]:
    """The compute capability of the device of `x`; where kernels are interpreted, that of a Hopper GPU."""
    return torch.cuda.get_device_capability(x.device) if x.device.type == "cuda" else (9, 0)


def _tags() -> dict[str, Any]:
    tag = getattr(torch.Tag, "cudagraph_unsafe", None)
    known = tag is not None and "tags" in inspect.signature(torch.library.custom_op).parameters
    return {"tags": (tag,)} if known else {}


MAKES_TABLES = _tags()
"""For `torch.library.custom_op`, of an operator that makes its tables when a shape is first seen, and keeps them.

Inductor's own CUDA graphs (`mode="reduce-overhead"`) would take the memory of such tables back between replays; with
the tag they end before the operator and begin anew after it. A graph that is captured by hand after a first call is
right. Earlier versions of PyTorch have no such tag, nor graphs in parts.
"""
