"""Feature maps without parameters, by the names that the papers give them: [..., d] -> [..., f].

Those with parameters are modules of the mixers that train them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

FeatureMap = Callable[[Tensor], Tensor]

LEAST = 1e-12
"""What Hedgehog's features are clamped to from below."""


def taylor(x: Tensor) -> Tensor:
    """`[1, x / d^(1/4), x x^T / sqrt(2 d)]`, 1 + d + d^2 features: products are 1 + s + s^2 / 2, s = q.k / sqrt(d)
    (2402.18668)."""
    scaled = x / x.shape[-1] ** 0.25
    second = (scaled[..., :, None] * scaled[..., None, :]).flatten(-2) / math.sqrt(2)
    return torch.cat([torch.ones_like(x[..., :1]), scaled, second], dim=-1)


def taylor_packed(x: Tensor) -> Tensor:
    """`taylor` without repetitions, 1 + d + d (d + 1) / 2 features of the same products."""
    scaled = x / x.shape[-1] ** 0.25
    row, column = torch.tril_indices(x.shape[-1], x.shape[-1], -1, device=x.device)
    parts = (
        torch.ones_like(x[..., :1]),
        scaled,
        scaled.square() / math.sqrt(2),
        scaled[..., row] * scaled[..., column],
    )
    return torch.cat(parts, dim=-1)


def softmax_both(x: Tensor) -> Tensor:
    """`[softmax(x), softmax(-x)]`, 2 d features (2402.04347)."""
    return torch.cat([x.softmax(-1), (-x).softmax(-1)], dim=-1).clamp(min=LEAST)


def exp_both(x: Tensor) -> Tensor:
    """`[exp(x - max x), exp(min x - x)]`, 2 d features: Hedgehog's map before its division."""
    positive = (x - x.amax(-1, keepdim=True)).exp()
    negative = (x.amin(-1, keepdim=True) - x).exp()
    return torch.cat([positive, negative], dim=-1).clamp(min=LEAST)


def softmax_half(x: Tensor) -> Tensor:
    """`softmax(x)`, d features: half of `softmax_both`."""
    return x.softmax(-1).clamp(min=LEAST)


def exp_half(x: Tensor) -> Tensor:
    """`exp(x - max x)`, d features: half of `exp_both`."""
    return (x - x.amax(-1, keepdim=True)).exp().clamp(min=LEAST)


def positive_elu(x: Tensor) -> Tensor:
    """`1 + elu(x)` (2006.16236)."""
    return 1 + F.elu(x)


FEATURE_MAPS: dict[str, FeatureMap] = {
    "taylor": taylor,
    "taylor_packed": taylor_packed,
    "softmax_both": softmax_both,
    "exp_both": exp_both,
    "softmax": softmax_half,
    "exp": exp_half,
    "elu": positive_elu,
    "relu": F.relu,
    "silu": F.silu,
    "square": torch.square,
    "softplus": F.softplus,
}
"""By name, for `linear_attention(feature_map=...)`."""
