"""Modules whose parameters stay in float32 or better, whatever dtype a model is cast to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn


class FullPrecision(nn.Module):
    """Its own parameters and buffers are not rounded by `.to(torch.bfloat16)`, `.bfloat16()` and the like.

    A recurrence applies its coefficients thousands of times, and forgets what bfloat16 rounds away. Loading in bfloat16
    keeps them too (`_keep_in_fp32_modules_strict`). Devices change as everywhere.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # what every cast and move of nn.Module goes through
        def kept(x: Tensor) -> Tensor:
            moved = fn(x)
            if not moved.is_floating_point() or moved.dtype in (torch.float32, torch.float64):
                return moved
            return x.to(moved.device, torch.float32)

        result: Any = super()._apply(kept, recurse)
        return result
