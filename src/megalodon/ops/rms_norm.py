"""The norm of each token by its root mean square: one pass over memory each way where kernels are compiled."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megalodon.ops import compiled
from megalodon.ops.backend import compiles
from megalodon.ops.compiled.tables import PART, RootMeanSquare


class _Compiled(torch.autograd.Function):
    """x [n, D], contiguous."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, factors = torch.empty_like(x), x.new_empty(len(x))
        _run("tokens.norm_forward", eps, x=x, weight=weight, y=y, factors=factors)
        ctx.save_for_backward(x, weight, factors)
        ctx.eps = eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor):
        x, weight, factors = ctx.saved_tensors
        dx, sums = torch.empty_like(x), x.new_empty(-(-len(x) // PART), x.shape[1])
        tensors = {"x": x, "weight": weight, "factors": factors, "y": dx, "dy": dy.contiguous(), "sums": sums}
        _run("tokens.norm_backward", ctx.eps, **tensors)
        return dx, sums.sum(0), None


def _run(name: str, eps: float, **tensors: Tensor) -> None:
    kernel, x, wide_eps = compiled.kernel(name), tensors["x"], np.array([eps])
    assert kernel is not None, "`compiles` has asked for it"
    table = np.zeros(len(RootMeanSquare), np.int64)
    table[RootMeanSquare.rows], table[RootMeanSquare.dim] = x.shape
    table[RootMeanSquare.eps] = wide_eps.ctypes.data
    for field, tensor in tensors.items():
        table[getattr(RootMeanSquare, field)] = tensor.data_ptr()
    kernel(table, x.numel())


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`x / sqrt(mean(x**2) + eps) * weight` over the last dimension.

    Args:
        x: [..., D], any floating dtype.
        weight: [D], the effective scale; None: 1.

    Returns:
        [..., D] in the dtype of x.
    """
    fits = weight is not None and weight.dtype == x.dtype and compiles(x, "tokens.norm_forward", "tokens.norm_backward")
    if weight is None or not fits:
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    y: Tensor = _Compiled.apply(x.flatten(0, -2).contiguous(), weight.contiguous(), eps)
    return y.view(x.shape)
