"""TimestepNorm for all tokens at once: cumulative sums of each token's moments, then one normalisation.

With w_i = n_{i-1} / n_i, `n_t var_t = n_0 var_0 + sum_i s_i + sum_i w_i (m_i - mean_{i-1})^2`: every term is positive,
so nothing cancels. The sums run over [B, L, G], a small part of the input, in float64 where the device has it, and are
differentiated by autograd; what runs over [B, L, D] is differentiated by hand, to pass over it as rarely as possible.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalodon.ops.backend import accumulator_dtype
from megalodon.ops.timestep_norm.statistics import Prior, Statistics


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
    m, s = (value.view(*x.shape[:2], -1) for value in _Moments.apply(rows, groups))
    count, mean, var = running_statistics(m, s, initial, prior, padding_mask, document_start)
    scale = torch.rsqrt(var + eps).to(compute)
    y = _Normalise.apply(rows, mean.to(compute).flatten(0, 1), scale.flatten(0, 1), weight, bias, groups).view(x.shape)
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
