"""The summed loss of many tokens, whose logits need not all exist at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 1 << 25
"""Logits that exist at a time (128 MiB in float32)."""


def sum_in_slices(loss_of: Callable[[Tensor, Tensor], Tensor], x: Tensor, targets: Tensor, rows: int) -> Tensor:
    """`loss_of(x, targets)`, a sum over tokens, taken over so many rows at a time; logits are made again for gradients.

    Args:
        loss_of: the summed loss (a scalar) of hidden states [n, D] and targets [n].
        x: hidden states [..., D].
        targets: int64 [...].
        rows: at most so many tokens at a time; less than one counts as one.
    """
    x, targets, rows = x.flatten(0, -2), targets.flatten(), max(rows, 1)
    if len(x) <= rows:
        return loss_of(x, targets)
    slices = zip(x.split(rows), targets.split(rows), strict=True)
    if not torch.is_grad_enabled():
        return torch.stack([loss_of(*pair) for pair in slices]).sum()
    return torch.stack([checkpoint(loss_of, *pair, use_reentrant=False) for pair in slices]).sum()
