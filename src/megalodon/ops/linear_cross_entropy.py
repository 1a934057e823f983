"""The loss of a linear head without its logits: the fused operator of liger-kernel, beside the Triton kernels."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor, nn

from megalodon.ops.backend import backend_for, without_kernels

LIGER_INSTALLED = find_spec("liger_kernel") is not None


def can_fuse(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear_cross_entropy` runs here and gives all gradients: never in a graph of torch.compile, nor for a
    sharded weight.
    """
    if not LIGER_INSTALLED or torch.compiler.is_compiling() or x.numel() == 0 or type(weight) is not nn.Parameter:
        return False
    if weight.requires_grad and torch.is_grad_enabled() and not x.requires_grad:
        return False  # it would leave a head that is trained alone without a gradient
    return backend_for(x.device, x.dtype)[0] == "triton" and without_kernels(x.device.type, x.device.index) is None


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The summed cross-entropy of `x @ weight.T`, float32; gradients are computed with it, in three products.

    Args:
        x: [n, D].
        weight: [V, D].
        targets: int64 [n]; -100 is ignored.
    """
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    no_bias, no_class_weights, no_penalty, no_smoothing, no_cap = None, None, 0.0, 0.0, None
    loss, *_ = LigerFusedLinearCrossEntropyFunction.apply(
        x, weight, targets, no_bias, no_class_weights, -100, no_penalty, no_smoothing, "sum", no_cap, False,
        torch.float32
    )  # fmt: skip
    return loss
