"""The summed loss of many tokens, whose logits need not all exist at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from megalodon.model.watch import is_forwarded_as_written
from megalodon.ops.backend import backend_for, without_kernels

LOGITS_AT_ONCE = 1 << 25
"""Logits that exist at a time (128 MiB in float32)."""

LIGER_INSTALLED = find_spec("liger_kernel") is not None


def summed_loss(head: nn.Linear, x: Tensor, targets: Tensor) -> Tensor:
    """The summed cross-entropy of `head(x)`, float32, with few logits at a time.

    Beside the Triton kernels, and with the package liger-kernel, by its fused operator: gradients are computed with the
    loss, in three products with the head where slices take four. It has no part in a graph of torch.compile.

    Args:
        head: without bias.
        x: hidden states [..., D].
        targets: int64 [...]; -100 is ignored.
    """
    if _is_fused(head, x):
        return _fused_loss(x.flatten(0, -2), head.weight, targets.flatten())
    return sum_in_slices(partial(_loss_of, head), x, targets, LOGITS_AT_ONCE // head.out_features)


def _loss_of(head: nn.Linear, x: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(x).float(), targets, reduction="sum")


def _is_fused(head: nn.Linear, x: Tensor) -> bool:
    if not LIGER_INSTALLED or torch.compiler.is_compiling() or x.numel() == 0:
        return False
    if backend_for(x.device, x.dtype)[0] != "triton" or without_kernels(x.device.type, x.device.index) is not None:
        return False
    if head.weight.requires_grad and torch.is_grad_enabled() and not x.requires_grad:
        return False  # it would leave the head alone without a gradient
    return is_forwarded_as_written(head, (nn.Linear,)) and type(head.weight) is nn.Parameter  # no DTensor


def _fused_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    no_bias, no_class_weights, no_penalty, no_smoothing, no_cap = None, None, 0.0, 0.0, None
    loss, *_ = LigerFusedLinearCrossEntropyFunction.apply(
        x, weight, targets, no_bias, no_class_weights, -100, no_penalty, no_smoothing, "sum", no_cap, False,
        torch.float32
    )  # fmt: skip
    return loss


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
