"""TimestepDecayNorm for all tokens at once: the averages by products with small matrices of powers of beta.

An average after token t is a sum of `beta**(n_t - n_s)` times the tokens s before it, n the count of tokens. Tokens are
cut into blocks; a product with one [T, T] matrix gives all sums inside blocks, and what enters a block is the same sum
again, over the ends of blocks. All of it runs over [B, L, G], a small part of the input, in float64 where the device
has it. No power that grows with the stream is ever formed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from megalodon.ops.backend import accumulator_dtype
from megalodon.ops.grouped import Groups, moments, normalise
from megalodon.ops.timestep_decay_norm.statistics import Decay, DecayedStatistics, correction, power

BLOCK = 64
"""Tokens in a block."""


class Places(NamedTuple):
    """Where tokens stand among those that count.

    Attributes:
        seen: int64 [B or 1, L]; tokens of the piece that count, up to this one. Restarts do not set it back.
        restarts: int64 [B or 1, L]; restarts up to this token.
        even: neither padding nor restarts: every block is like every other.
    """

    seen: Tensor
    restarts: Tensor
    even: bool

    def ends(self, size: int) -> Places:
        """Those of the last token of each block of `size`."""
        return Places(self.seen[:, size - 1 :: size], self.restarts[:, size - 1 :: size], self.even)


def places_of(x: Tensor, padding_mask: Tensor | None, restart: Tensor | None) -> Places:
    """Of a batch x [B, L, ...]."""
    length = x.shape[1]
    index = torch.arange(1, length + 1, device=x.device)[None]
    seen = index if padding_mask is None else (~padding_mask).cumsum(1)
    restarts = torch.zeros_like(index) if restart is None else restart.cumsum(1)
    return Places(seen, restarts, padding_mask is None and restart is None)


def _weights(beta: float, after: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """[..., t, s]: `beta**(seen_t - seen_s)`, 0 where a restart lies between; of pairs (seen, restarts)."""
    distance = after[0][..., :, None] - before[0][..., None, :]
    same = after[1][..., :, None] == before[1][..., None, :]
    return power(beta, distance.clamp(min=0), dtype) * (same & (distance >= 0))


def decayed_sums(values: Tensor, beta: float, places: Places) -> Tensor:
    """`sum_s beta**(seen_t - seen_s) values_s` over s <= t since the last restart; values [B, L, G] -> [B, L, G].

    A token that does not count must have the value zero.
    """
    length = values.shape[1]
    seen, restarts, even = places
    if length <= BLOCK:
        own = (seen, restarts)
        lower = torch.ones(length, length, dtype=torch.bool, device=values.device).tril()
        return torch.matmul(_weights(beta, own, own, values.dtype) * lower, values)
    missing = -length % BLOCK
    padded = F.pad(values, (0, 0, 0, missing)) if missing else values
    seen, restarts = (F.pad(x, (0, missing)) for x in (seen, restarts))  # empty places are read by none
    blocks = Places(seen, restarts, even)
    inner_seen, inner_restarts = (x.unflatten(1, (-1, BLOCK)) for x in (seen, restarts))
    own = (inner_seen[:, :1], inner_restarts[:, :1]) if even else (inner_seen, inner_restarts)
    lower = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=values.device).tril()
    inner = torch.matmul(_weights(beta, own, own, values.dtype) * lower, padded.unflatten(1, (-1, BLOCK)))
    ends = blocks.ends(BLOCK)
    totals = decayed_sums(inner[:, :, -1], beta, ends)[:, :-1]  # after each block but the last
    entered = (ends.seen[:, :-1, None], ends.restarts[:, :-1, None])
    share = _weights(beta, (inner_seen[:, 1:], inner_restarts[:, 1:]), entered, values.dtype)
    later = torch.addcmul(inner[:, 1:], share, totals[:, :, None])
    return torch.cat([inner[:, :1], later], dim=1).flatten(1, 2)[:, :length]


def counts(places: Places, before: Tensor, padding_mask: Tensor | None, restart: Tensor | None) -> Tensor:
    """int64 [B, L]: tokens that each token's statistics are of, itself included; before [B]: of the carried ones."""
    count = places.seen + before[:, None]
    if restart is None:
        return count
    present = 1 if padding_mask is None else (~padding_mask).long()
    skipped = torch.where(restart, places.seen - present, 0).cummax(1).values
    return torch.where(places.restarts == 0, count, places.seen - skipped)


def running_statistics(
    m: Tensor,
    s: Tensor,
    initial: DecayedStatistics,
    decay: Decay,
    padding_mask: Tensor | None,
    restart: Tensor | None,
) -> DecayedStatistics:
    """The raw statistics after each token.

    Args:
        m, s: [B, L, G]; mean and population variance of each token's features in each group.
        initial: the statistics before the first token.
        padding_mask: bool [B, L]; True where a token leaves the statistics alone.
        restart: bool [B, L]; True where they are forgotten before the token.

    Returns:
        count int64 [B, L]; mean and var [B, L, G] in the accumulator's dtype.
    """
    wide = accumulator_dtype(m.device)
    m, s = m.to(wide), s.to(wide)
    if padding_mask is not None:
        m, s = (value.masked_fill(padding_mask[..., None], 0) for value in (m, s))
    places = places_of(m, padding_mask, restart)
    continues = places.restarts == 0
    count = counts(places, initial.count, padding_mask, restart)

    def average(beta: float, values: Tensor, before: Tensor) -> Tensor:
        share = power(beta, places.seen, wide) * continues
        return torch.addcmul(
            decayed_sums(values * (1 - beta), beta, places), share[..., None], before.to(wide)[:, None]
        )

    return DecayedStatistics(count, average(decay.mean, m, initial.mean), average(decay.var, s, initial.var))


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
    if x.shape[1] == 0:
        return x, initial
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    u = x.to(compute)
    weight, bias = (None if value is None else value.to(compute) for value in (weight, bias))
    if x.shape[1] == 1 and padding_mask is None and restart is None:
        y, last = one_token(u, weight, bias, initial, decay, eps)
        return y.to(x.dtype), last
    groups, rows = Groups(u, initial.mean.shape[-1]), u.flatten(0, 1)
    m, s = (value.view(*x.shape[:2], -1) for value in moments(rows, groups))
    count, mean, var = running_statistics(m, s, initial, decay, padding_mask, restart)
    centre, scale = corrected(mean, var, count, decay, eps)
    centre, scale = (value.to(compute).flatten(0, 1) for value in (centre, scale))
    y = normalise(rows, centre, scale, weight, bias, groups).view(x.shape)
    if padding_mask is not None:
        y = y.masked_fill(padding_mask[..., None], 0)
    state = initial.mean.dtype
    return y.to(x.dtype), DecayedStatistics(
        count[:, -1].clone(), mean[:, -1].to(state, copy=True), var[:, -1].to(state, copy=True)
    )


def corrected(mean: Tensor, var: Tensor, count: Tensor, decay: Decay, eps: float) -> tuple[Tensor, Tensor]:
    """The mean without bias and `1 / sqrt(variance without bias + eps)`: mean, var [..., G], count [...]."""
    centre = mean / correction(decay.mean, count, mean.dtype)[..., None]
    return centre, torch.rsqrt(var / correction(decay.var, count, var.dtype)[..., None] + eps)


def one_token(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, initial: DecayedStatistics, decay: Decay, eps: float
) -> tuple[Tensor, DecayedStatistics]:
    """One token a row, [B, 1, D]: the definition's own update."""
    wide, (batch, _, dim) = accumulator_dtype(x.device), x.shape
    u = x.view(batch, initial.mean.shape[-1], -1)
    s, m = torch.var_mean(u, -1, correction=0)
    mean = torch.lerp(initial.mean.to(wide), m.to(wide), 1 - decay.mean)
    var = torch.lerp(initial.var.to(wide), s.to(wide), 1 - decay.var)
    count = initial.count + 1
    centre, scale = corrected(mean, var, count, decay, eps)
    y = ((u - centre.to(x.dtype)[..., None]) * scale.to(x.dtype)[..., None]).view(batch, 1, dim)
    if weight is not None:
        y = y * (weight + 1)
    if bias is not None:
        y = y + bias
    state = initial.mean.dtype
    return y, DecayedStatistics(count, mean.to(state), var.to(state))
