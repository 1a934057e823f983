"""The summed loss of many tokens, whose logits need not all exist at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from megalodon.models.layers.watch import is_forwarded_as_written
from megalodon.ops.linear_cross_entropy import can_fuse, linear_cross_entropy

LOGITS_AT_ONCE = 1 << 25
"""Logits that exist at a time (128 MiB in float32)."""


def summed_loss(head: nn.Linear, x: Tensor, targets: Tensor) -> Tensor:
    """The summed cross-entropy of `head(x)`, float32, with few logits at a time, fused with the head where it can be.

    Args:
        head: any linear layer; one with a bias, hooks or a `forward` of its own takes slices.
        x: hidden states [..., D].
        targets: int64 [...]; -100 is ignored.
    """
    if _is_fused(head, x):
        return linear_cross_entropy(x.flatten(0, -2), head.weight, targets.flatten())
    return sum_in_slices(partial(_loss_of, head), x, targets, LOGITS_AT_ONCE // head.out_features)


def _is_fused(head: nn.Linear, x: Tensor) -> bool:
    return head.bias is None and is_forwarded_as_written(head, (nn.Linear,)) and can_fuse(x, head.weight)


def _loss_of(head: nn.Linear, x: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(x).float(), targets, reduction="sum")


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


def mean_of(total: Tensor, targets: Tensor, count: Tensor | int | None) -> Tensor:
    """A summed loss over `count`; None: over the number of targets, which are not -100."""
    if count is None:
        return total / (targets != -100).sum().to(total.device)
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)
