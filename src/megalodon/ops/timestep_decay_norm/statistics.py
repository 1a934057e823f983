"""What TimestepDecayNorm knows of a sequence, and how what two pieces know is joined."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megalodon.ops.backend import accumulator_dtype


class Decay(NamedTuple):
    """beta1 of the mean and beta2 of the variance, both between 0 and 1."""

    mean: float
    var: float


class DecayedStatistics(NamedTuple):
    """count int64 [B]; mean and var [B, G], float32 or float64, raw: before the correction of their bias."""

    count: Tensor  # type: ignore[assignment]  # hides a tuple's method
    mean: Tensor
    var: Tensor

    @staticmethod
    def fresh(batch: int, groups: int, dtype: torch.dtype, device: torch.device) -> DecayedStatistics:
        """Nothing seen: all zero."""
        zeros = torch.zeros(batch, groups, dtype=dtype, device=device)
        return DecayedStatistics(torch.zeros(batch, dtype=torch.int64, device=device), zeros, zeros)


def power(beta: float, count: Tensor, dtype: torch.dtype) -> Tensor:
    """`beta**count`, of whole numbers up to billions."""
    return torch.exp(count.to(dtype) * math.log(beta))


def correction(beta: float, count: Tensor, dtype: torch.dtype) -> Tensor:
    """`1 - beta**count` without cancellation: what an average of `count` tokens, begun at zero, has to be divided by.

    1 before the first token, where there is nothing to divide.
    """
    return torch.where(count > 0, -torch.expm1(count.to(dtype) * math.log(beta)), 1)


def joined(
    before: DecayedStatistics, span: DecayedStatistics, restarted: Tensor | None, decay: Decay
) -> DecayedStatistics:
    """The statistics after a span, of those before it and of the span's own, computed from nothing.

    `joined` is associative: spans can be computed apart, on as many devices, and joined in any grouping.

    Args:
        before: [B] and [B, G].
        span: [B] and [B, G]; what `decayed_statistics` finds without initial statistics.
        restarted: bool [B]; rows in which a BOS token or a new document in the span forgot what was before. None: none.
        decay: the betas.
    """
    wide = accumulator_dtype(span.mean.device)
    kept = torch.ones_like(span.count, dtype=torch.bool) if restarted is None else ~restarted

    def average(beta: float, old: Tensor, new: Tensor) -> Tensor:
        weight = power(beta, span.count, wide) * kept
        return (weight[:, None] * old.to(wide) + new.to(wide)).to(new.dtype)

    return DecayedStatistics(
        span.count + before.count * kept,
        average(decay.mean, before.mean, span.mean),
        average(decay.var, before.var, span.var),
    )
