"""Norms over the features of one token. Every scale is stored as an offset: the effective scale is `weight + 1`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from megalodon import ops


def effective(weight: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`weight + 1` in `dtype`, rounded once: bfloat16 cannot hold the sum of 1 and a small offset."""
    if weight is None or weight.dtype == dtype == torch.float32:
        return None if weight is None else weight + 1
    return (weight.to(torch.promote_types(weight.dtype, torch.float32)) + 1).to(dtype)


def _zero_parameters(norm: nn.Module) -> None:
    for parameter in norm.parameters(recurse=False):
        init.zeros_(parameter)


class RMSNorm(nn.Module):
    """Root-mean-square norm of the last dimension, in groups; `weight` [D] is the stored offset, None if not affine."""

    def __init__(self, dim: int, eps: float, affine: bool, groups: int = 1) -> None:
        super().__init__()
        self.eps, self.groups = eps, groups
        self.weight = nn.Parameter(torch.zeros(dim)) if affine else None

    def initialize(self) -> None:
        """Scale 1."""
        _zero_parameters(self)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        weight = effective(self.weight, x.dtype)
        if self.groups == 1:
            return ops.rms_norm(x, weight, self.eps)
        y = x.unflatten(-1, (self.groups, -1))
        y = F.rms_norm(y, y.shape[-1:], None, self.eps).flatten(-2)
        return y if weight is None else y * weight


class LayerNorm(nn.Module):
    """Layer norm of the last dimension, in groups; `weight` [D] is the stored offset; both None without affine."""

    def __init__(self, dim: int, eps: float, affine: bool, groups: int = 1) -> None:
        super().__init__()
        self.eps, self.groups = eps, groups
        self.weight = nn.Parameter(torch.zeros(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine else None

    def initialize(self) -> None:
        """Scale 1, bias 0."""
        _zero_parameters(self)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        weight = effective(self.weight, x.dtype)
        if self.groups == 1:
            return F.layer_norm(x, x.shape[-1:], weight, bias, self.eps)
        y = x.unflatten(-1, (self.groups, -1))
        y = F.layer_norm(y, y.shape[-1:], None, None, self.eps).flatten(-2)
        y = y if weight is None else y * weight
        return y if bias is None else y + bias
