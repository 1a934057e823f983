"""TimestepNorm by its definition: running statistics updated one token at a time. Any dtype, any device."""

from __future__ import annotations

import torch
from torch import Tensor

from megalodon.ops.timestep_norm.statistics import Prior, Statistics


def timestep_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    initial: Statistics,
    prior: Prior | None,
    padding_mask: Tensor | None,
    document_start: Tensor | None,
    eps: float,
) -> tuple[Tensor, Statistics]:
    """See `megalodon.ops.timestep_norm`."""
    count, mean, var = initial
    batch, length, dim = x.shape
    groups = mean.shape[-1]
    u = x.to(mean.dtype).view(batch, length, groups, dim // groups)
    outputs = []
    for t in range(length):
        if document_start is not None and t > 0:
            assert prior is not None
            starts = document_start[:, t] == t
            count = torch.where(starts, prior.count, count)
            mean = torch.where(starts[:, None], prior.mean, mean)
            var = torch.where(starts[:, None], prior.var, var)
        m = u[:, t].mean(-1)
        s = u[:, t].var(-1, correction=0)
        n = count + 1
        c1, c2 = (count.to(mean.dtype) / n)[:, None], (1 / n.to(mean.dtype))[:, None]
        new_var = c1 * var + c2 * s + c1 * c2 * (m - mean) ** 2
        new_mean = c1 * mean + c2 * m
        y = (u[:, t] - new_mean[..., None]) / torch.sqrt(new_var + eps)[..., None]
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
    return y.to(x.dtype), Statistics(count, mean, var)
