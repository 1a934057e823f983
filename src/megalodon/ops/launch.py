"""What every launch of a Triton kernel shares."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Makes the device of `x` the current one: Triton launches there, whichever device that is."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()
