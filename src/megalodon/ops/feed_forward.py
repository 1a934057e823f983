"""The gated feed-forward layer with its norm, of which little is kept for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megalodon.ops import gate
from megalodon.ops.backend import compiles


class _Compiled(torch.autograd.Function):
    """y [n, D] and weights in float32: kept are y and the two wide products; norm and gate are cheap to make anew."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, scale: Tensor | None, bias: Tensor | None, eps: float, up: Tensor, side: Tensor,
        down: Tensor,
    ) -> Tensor:  # fmt: skip
        n, mean, spread = torch.native_layer_norm(y, y.shape[1:], scale, bias, eps)
        a, b = n @ up.t(), n @ side.t()
        ctx.save_for_backward(y, mean, spread, scale, bias, up, side, down, a, b)
        ctx.eps, hidden = eps, torch.empty_like(a)
        gate.run("gates.forward", a=a, b=b, out=hidden)
        return hidden @ down.t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        y, mean, spread, scale, bias, up, side, down, a, b = ctx.saved_tensors
        needs_y, needs_scale, needs_bias, _, needs_up, needs_side, needs_down = ctx.needs_input_grad
        da, db, d_down = gate.gated_gradients(a, b, down, grad, needs_down)
        d_up = d_side = None
        if needs_up or needs_side:
            n = torch.native_layer_norm(y, y.shape[1:], scale, bias, ctx.eps)[0]
            d_up, d_side = (d.t() @ n if needed else None for d, needed in ((da, needs_up), (db, needs_side)))
        dn = (da @ up).addmm_(db, side)
        wanted = [needs_y, needs_scale, needs_bias]
        dy, d_scale, d_bias = torch.ops.aten.native_layer_norm_backward(
            dn, y, y.shape[1:], mean, spread, scale, bias, wanted
        )
        return dy, d_scale if needs_scale else None, d_bias if needs_bias else None, None, d_up, d_side, d_down


def feed_forward(
    y: Tensor, scale: Tensor | None, bias: Tensor | None, eps: float, up: Tensor, side: Tensor, down: Tensor
) -> Tensor:
    """`(silu(n @ up.T) * (n @ side.T)) @ down.T`, n the layer norm of y.

    Args:
        y: [..., D].
        scale, bias: [D], of the norm, the effective scale; None: 1 and 0.
        up, side: [F, D]. down: [D, F].

    Returns:
        [..., D] in the dtype of y; under autocast in its dtype.
    """
    weights = [weight for weight in (scale, bias, up, side, down) if weight is not None]
    plain = all(w.dtype == y.dtype for w in weights) and not torch.is_autocast_enabled(y.device.type)
    if plain and compiles(y, *gate.KERNELS):
        flat = y.flatten(0, -2).contiguous()
        result: Tensor = _Compiled.apply(flat, scale, bias, eps, up, side, down)
        return result.view(y.shape)
    n = F.layer_norm(y, y.shape[-1:], scale, bias, eps)
    return F.linear(gate.silu_product(F.linear(n, up), F.linear(n, side)), down)
