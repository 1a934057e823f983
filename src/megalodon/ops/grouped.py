"""Moments of a token's features in groups, and normalising by a mean and a scale for each group, in few passes.

What runs over [B, L, D] is differentiated by hand, to pass over it as rarely as possible.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@torch.compiler.assume_constant_result
def _exact_products() -> bool:
    """Whether float32 products are not rounded; the compiler asks once."""
    return torch.get_float32_matmul_precision() == "highest"


class Groups:
    """Sums over the features of a group, and back: by products with a 0/1 matrix, many times quicker on a CPU than
    reductions and broadcasts over a few features. A product spreads values exactly: each has one term.

    Args:
        x: [..., D]; its width, dtype and device are those to come.
        count: G.
    """

    def __init__(self, x: Tensor, count: int) -> None:
        self.count, self.size = count, x.shape[-1] // count
        self.matrix = None  # [G, D]
        if self.size > 1 and x.device.type == "cpu" and _exact_products():
            self.matrix = torch.eye(count, dtype=x.dtype, device=x.device).repeat_interleave(self.size, dim=1)

    def sum(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """[n, D] -> [n, G]: sums of `x * weight`, weight [D]."""
        if self.matrix is None:
            return (x if weight is None else x * weight).unflatten(-1, (self.count, -1)).sum(-1)
        return x @ (self.matrix if weight is None else self.matrix * weight).t()

    def spread(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """[n, G] -> [n, D]: each group's value, by weight [D]."""
        if self.matrix is None:
            spread = x.repeat_interleave(self.size, dim=-1)
            return spread if weight is None else spread * weight
        return x @ (self.matrix if weight is None else self.matrix * weight)

    def add(self, x: Tensor, values: Tensor, factor: float = 1.0) -> Tensor:
        """[n, D] and [n, G] -> `x + factor * spread(values)`."""
        if self.matrix is None:
            return torch.add(x, self.spread(values), alpha=factor)
        return torch.addmm(x, values, self.matrix, alpha=factor)

    def own(self, products: Tensor, values: Tensor) -> Tensor:
        """[n, D] and [n, G] -> [D]: `(products * spread(values)).sum(0)`."""
        if self.matrix is None:
            return (products * self.spread(values)).sum(0)
        return ((values.t() @ products) * self.matrix).sum(0)


class _Moments(torch.autograd.Function):
    """Each token's mean and population variance in each group: [n, D] -> twice [n, G]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
        m = groups.sum(x).div_(groups.size)
        s = groups.sum(groups.add(x, m, -1).square_()).div_(groups.size)
        ctx.save_for_backward(x, m)
        ctx.groups = groups
        return m, s

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_m: Tensor, d_s: Tensor):
        (x, m), groups = ctx.saved_tensors, ctx.groups
        dx = groups.add(x, m, -1).mul_(groups.spread(d_s))
        return groups.add(dx.mul_(2 / groups.size), d_m, 1 / groups.size), None


class _Normalise(torch.autograd.Function):
    """`(x - mean) * scale * (weight + 1) + bias` with x [n, D], mean and scale [n, G]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None, groups: Groups
    ) -> Tensor:
        weight = None if weight is None else weight + 1
        y = groups.add(x, mean, -1).mul_(groups.spread(scale, weight))
        if bias is not None:
            y.add_(bias)
        ctx.save_for_backward(x, mean, scale, weight)
        ctx.groups = groups
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor):
        x, mean, scale, weight = ctx.saved_tensors
        groups, (_, _, _, need_weight, need_bias, _) = ctx.groups, ctx.needs_input_grad
        products = groups.add(x, mean, -1).mul_(dy)
        d_mean = groups.sum(dy, weight).mul_(scale).neg_()
        d_scale = groups.sum(products, weight)
        d_weight = groups.own(products, scale) if need_weight else None
        dx = groups.spread(scale, weight).mul_(dy)
        return dx, d_mean, d_scale, d_weight, dy.sum(0) if need_bias else None, None


def moments(x: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
    """Each token's mean and population variance in each group: x [n, D] -> twice [n, G]."""
    return _Moments.apply(x, groups)


def normalise(
    x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None, groups: Groups
) -> Tensor:
    """`(x - mean) * scale * (weight + 1) + bias` with x [n, D], mean and scale [n, G], weight and bias [D]."""
    return _Normalise.apply(x, mean, scale, weight, bias, groups)
