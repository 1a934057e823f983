"""What TimestepNorm knows of a sequence: a count, and a mean and variance for each group of channels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Statistics(NamedTuple):
    """count int64 [B]; mean and var [B, G], float32 or float64. (`count` hides a tuple's method, here and below.)"""

    count: Tensor  # type: ignore[assignment]
    mean: Tensor
    var: Tensor


class Prior(NamedTuple):
    """What is assumed before the first token of a document: count of imagined tokens; mean and var [G]."""

    count: int  # type: ignore[assignment]
    mean: Tensor
    var: Tensor

    @staticmethod
    def default(groups: int, dtype: torch.dtype, device: torch.device) -> Prior:
        """No imagined tokens: the first token's own statistics decide."""
        return Prior(0, torch.zeros(groups, dtype=dtype, device=device), torch.ones(groups, dtype=dtype, device=device))
