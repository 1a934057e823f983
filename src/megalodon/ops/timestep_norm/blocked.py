"""TimestepNorm for all tokens at once: cumulative sums of each token's moments, then one normalisation.

With w_i = n_{i-1} / n_i, `n_t var_t = n_0 var_0 + sum_i s_i + sum_i w_i (m_i - mean_{i-1})^2`: every term is positive,
so nothing cancels. The sums run over [B, L, G], a small part of the input, in float64 where the device has it, and are
differentiated by autograd; what runs over [B, L, D] is differentiated by hand, to pass over it as rarely as possible.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalodon.ops.backend import accumulator_dtype
from megalodon.ops.grouped import Groups, moments, normalise
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
    if x.shape[1] == 0:
        return x, initial
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    u = x.to(compute)
    weight, bias = (None if value is None else value.to(compute) for value in (weight, bias))
    if x.shape[1] == 1 and padding_mask is None:
        y, last = one_token(u, weight, bias, initial, eps)
        return y.to(x.dtype), last
    groups, rows = Groups(u, initial.mean.shape[-1]), u.flatten(0, 1)
    m, s = (value.view(*x.shape[:2], -1) for value in moments(rows, groups))
    count, mean, var = running_statistics(m, s, initial, prior, padding_mask, document_start)
    scale = torch.rsqrt(var + eps).to(compute)
    y = normalise(rows, mean.to(compute).flatten(0, 1), scale.flatten(0, 1), weight, bias, groups).view(x.shape)
    if padding_mask is not None:
        y = y.masked_fill(padding_mask[..., None], 0)
    state = initial.mean.dtype
    # copies: a state must not keep the statistics of every token alive
    last = Statistics(count[:, -1].clone(), mean[:, -1].to(state, copy=True), var[:, -1].to(state, copy=True))
    return y.to(x.dtype), last


def one_token(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, initial: Statistics, eps: float
) -> tuple[Tensor, Statistics]:
    """One token a row, [B, 1, D]: the definition's own update, in as few operations as decoding deserves."""
    wide, (batch, _, dim) = accumulator_dtype(x.device), x.shape
    u = x.view(batch, initial.mean.shape[-1], -1)
    s, m = torch.var_mean(u, -1, correction=0)
    m, s, mean, var = m.to(wide), s.to(wide), initial.mean.to(wide), initial.var.to(wide)
    count = initial.count + 1
    share = count.to(wide).reciprocal()[:, None]
    step = m - mean
    mean = torch.addcmul(mean, share, step)
    var = torch.lerp(torch.addcmul(var, share * step, step), s, share)
    y = (u - mean.to(x.dtype)[..., None]) * torch.rsqrt(var + eps).to(x.dtype)[..., None]
    y = y.view(batch, 1, dim)
    if weight is not None:
        y = y * (weight + 1)
    if bias is not None:
        y = y + bias
    state = initial.mean.dtype
    return y, Statistics(count, mean.to(state), var.to(state))


def running_statistics(
    m: Tensor,
    s: Tensor,
    initial: Statistics,
    prior: Prior | None,
    padding_mask: Tensor | None,
    document_start: Tensor | None,
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
    count_0, mean_0, var_0 = initial.count[:, None], initial.mean[:, None].to(wide), initial.var[:, None].to(wide)
    if document_start is not None:
        assert prior is not None
        first = (document_start == 0)[..., None]
        count_0 = torch.where(first[..., 0], count_0, prior.count)
        mean_0 = torch.where(first, mean_0, prior.mean.to(wide))
        var_0 = torch.where(first, var_0, prior.var.to(wide))
    present = torch.ones(m.shape[:2], dtype=torch.int64, device=m.device)
    if padding_mask is not None:
        present = (~padding_mask).long()
        m = torch.where(padding_mask[..., None], 0, m)
    count = count_0 + cumulative(present[..., None], document_start)[..., 0]
    n, n_0 = count.clamp(min=1)[..., None].to(wide), count_0[..., None].to(wide)

    mean = (n_0 * mean_0 + cumulative(m, document_start)) / n
    spread = torch.addcmul(s, (n - 1) / n, (m - previous(mean, mean_0, document_start)).square())
    if padding_mask is not None:
        spread = torch.where(padding_mask[..., None], 0, spread)
    var = (n_0 * var_0 + cumulative(spread, document_start)) / n
    if padding_mask is not None:
        empty = (count == 0)[..., None]
        mean, var = torch.where(empty, mean_0, mean), torch.where(empty, var_0, var)
    return Statistics(count, mean, var)


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
