"""TimestepDecayNorm by its definition: averages that decay, updated one token at a time. Any dtype, any device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megalodon.ops.timestep_decay_norm.statistics import Decay, DecayedStatistics


def timestep_decay_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    initial: DecayedStatistics,
    decay: Decay,
    padding_mask: Tensor | None,
    restart: Tensor | None,
    eps: float,
) -> tuple[Tensor, DecayedStatistics]:
    """See `megalodon.ops.timestep_decay_norm`; `restart` bool [B, L]: statistics are forgotten before the token."""
    count, mean, var = initial
    batch, length, dim = x.shape
    groups = mean.shape[-1]
    u = x.to(mean.dtype).view(batch, length, groups, dim // groups)
    outputs = []
    for t in range(length):
        if restart is not None:
            forgets = restart[:, t]
            count = torch.where(forgets, 0, count)
            mean, var = (torch.where(forgets[:, None], 0, value) for value in (mean, var))
        m, s = u[:, t].mean(-1), u[:, t].var(-1, correction=0)
        n = count + 1
        new_mean = decay.mean * mean + (1 - decay.mean) * m
        new_var = decay.var * var + (1 - decay.var) * s
        exponent = n.double()[:, None]
        mean_hat = new_mean / -torch.expm1(exponent * math.log(decay.mean)).to(mean.dtype)
        var_hat = new_var / -torch.expm1(exponent * math.log(decay.var)).to(var.dtype)
        y = (u[:, t] - mean_hat[..., None]) / torch.sqrt(var_hat + eps)[..., None]
        if padding_mask is not None:
            real = ~padding_mask[:, t]
            n = torch.where(real, n, count)
            new_mean = torch.where(real[:, None], new_mean, mean)
            new_var = torch.where(real[:, None], new_var, var)
        count, mean, var = n, new_mean, new_var
        outputs.append(y.reshape(batch, dim))
    y = torch.stack(outputs, dim=1) if outputs else u.reshape(batch, length, dim)
    if weight is not None:
        y = y * (weight.to(y.dtype) + 1)
    if bias is not None:
        y = y + bias.to(y.dtype)
    if padding_mask is not None:
        y = y.masked_fill(padding_mask[..., None], 0)
    return y.to(x.dtype), DecayedStatistics(count, mean, var)
