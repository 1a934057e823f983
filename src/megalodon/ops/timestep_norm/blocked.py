"""TimestepNorm for all tokens at once: cumulative sums of each token's moments, then one normalisation.

With w_i = n_{i-1} / n_i, `n_t var_t = n_0 var_0 + sum_i s_i + sum_i w_i (m_i - mean_{i-1})^2`: every term is positive,
so nothing cancels. The sums run over [B, L, G], a small part of the input, in float64 where the device has it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalodon.ops.backend import accumulator_dtype
from megalodon.ops.timestep_norm.statistics import Prior, Statistics


def timestep_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    initial: Statistics,
    prior: Prior,
    padding_mask: Tensor | None,
    document_start: Tensor | None,
    eps: float,
) -> tuple[Tensor, Statistics]:
    """See `megalodon.ops.timestep_norm`."""
    batch, length, dim = x.shape
    if length == 0:
        return x, initial
    groups = initial.mean.shape[-1]
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    u = x.to(compute).view(batch, length, groups, dim // groups)
    m = u.mean(-1)
    s = (u - m[..., None]).square().mean(-1)
    if length == 1 and padding_mask is None:
        count, mean, var = one_step(m, s, initial)
    else:
        count, mean, var = running_statistics(m, s, initial, prior, padding_mask, document_start)
    scale = torch.rsqrt(var + eps).to(compute)[..., None]
    y = ((u - mean.to(compute)[..., None]) * scale).view(batch, length, dim)
    if weight is not None:
        effective = weight.to(compute) + 1
        y = y * effective if bias is None else torch.addcmul(bias.to(compute), y, effective)
    elif bias is not None:
        y = y + bias.to(compute)
    if padding_mask is not None:
        y = y.masked_fill(padding_mask[..., None], 0)
    state = initial.mean.dtype
    return y.to(x.dtype), Statistics(count[:, -1], mean[:, -1].to(state), var[:, -1].to(state))


def one_step(m: Tensor, s: Tensor, initial: Statistics) -> Statistics:
    """`running_statistics` of one token: the definition's own update."""
    wide = accumulator_dtype(m.device)
    m, s, mean, var = m.to(wide), s.to(wide), initial.mean[:, None].to(wide), initial.var[:, None].to(wide)
    count = initial.count[:, None] + 1
    share = 1 / count[..., None].to(wide)
    step = m - mean
    rest = 1 - share
    return Statistics(count, mean + share * step, rest * (var + share * step * step) + share * s)


def running_statistics(
    m: Tensor, s: Tensor, initial: Statistics, prior: Prior, padding_mask: Tensor | None, document_start: Tensor | None
) -> Statistics:
    """The statistics after each token.

    Args:
        m, s: [B, L, G]; mean and population variance of each token's features in each group.
        initial: the statistics before the first token.
        prior: the statistics before the first token of every later document.
        padding_mask: bool [B, L]; True where a token leaves the statistics alone.
        document_start: int64 [B, L]; the index of the first token of the token's document. None: 0.

    Returns:
        count int64 [B, L]; mean and var [B, L, G] in the accumulator's dtype.
    """
    wide = accumulator_dtype(m.device)
    m, s = m.to(wide), s.to(wide)
    real = (
        torch.ones(m.shape[:2], dtype=torch.int64, device=m.device) if padding_mask is None else (~padding_mask).long()
    )
    count_0, mean_0, var_0 = initial.count[:, None], initial.mean[:, None].to(wide), initial.var[:, None].to(wide)
    if document_start is not None:
        first = (document_start == 0)[..., None]
        count_0 = torch.where(first[..., 0], count_0, prior.count)
        mean_0 = torch.where(first, mean_0, prior.mean.to(wide))
        var_0 = torch.where(first, var_0, prior.var.to(wide))
    present = real[..., None].to(wide)
    count = count_0 + cumulative(real[..., None], document_start)[..., 0]
    n, n_0 = count.clamp(min=1)[..., None].to(wide), count_0[..., None].to(wide)
    empty = (count == 0)[..., None]

    mean = (n_0 * mean_0 + cumulative(m * present, document_start)) / n
    mean = torch.where(empty, mean_0, mean)
    before = previous(mean, mean_0, document_start)
    spread = present * (s + (n - 1) / n * (m - before).square())
    var = (n_0 * var_0 + cumulative(spread, document_start)) / n
    return Statistics(count, mean, torch.where(empty, var_0, var))


def cumulative(values: Tensor, document_start: Tensor | None) -> Tensor:
    """Sums along time of [B, L, G], restarted at each document."""
    total = values.cumsum(1)
    if document_start is None:
        return total
    before = total - values
    return total - before.gather(1, document_start[..., None].expand_as(before))


def previous(mean: Tensor, mean_0: Tensor, document_start: Tensor | None) -> Tensor:
    """The mean before each token: the one after its predecessor, or `mean_0` for the first of a document."""
    shifted = torch.cat([mean_0[:, :1], mean[:, :-1]], dim=1)
    if document_start is None:
        return shifted
    index = torch.arange(mean.shape[1], device=mean.device)
    return torch.where((document_start == index)[..., None], mean_0, shifted)
