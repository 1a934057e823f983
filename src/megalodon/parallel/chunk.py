"""Chunk parallelism: each rank computes its span from an empty memory at once, then what came before is added.

Both memories compose associatively, so nobody waits in line:

- TimestepNorm: (count, mean, M2) of pieces pool exactly, whatever their order (Chan et al., 1983);
- CEMA is linear: the state before a span is `sum_s q**distance(s) h_s` over the earlier spans' own end states h_s, and
  it adds `Re(sum_j g_j q_j**(t+1) h_j)` to token t.

A layer gathers one [B, 2, G] and one [B, D, N] a rank, whatever the length. Attention needs an exchange only where a
span begins inside a chunk: the open chunk's keys and values, fewer than C tokens.

A memory that enters a batch (streamed rows) is the same on every rank, and so is the one that leaves it: all are made
of what all ranks have gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megalodon import ops
from megalodon.models.layers.cema import CEMA
from megalodon.models.layers.open_chunk import OpenChunk
from megalodon.models.layers.timestep_norm import Moments, TimestepNorm
from megalodon.ops.backend import accumulator_dtype
from megalodon.ops.cema.blocked import powers
from megalodon.parallel.collectives import Exchange, Group, all_to_all
from megalodon.parallel.spans import Reach, SpanLayout, Spans

RESPONSE_BLOCK = 128
"""Tokens that `prefix_response` computes from one state. Costs grow with this and with length / this."""


def _computed_again(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """What is cheap to compute is not kept for the backward pass, but computed again there."""
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


# --- TimestepNorm -------------------------------------------------------------------------------------------


def tail_moments(x: Tensor, groups: int, layout: SpanLayout) -> Tensor:
    """[B, 2, G]: mean and M2 / count of the span's tokens that belong to the document at its end."""
    wide = accumulator_dtype(x.device)
    u = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (groups, -1))
    m = u.mean(-1)
    s = (u - m[..., None]).square().mean(-1).to(wide)
    m = m.to(wide)
    spans = layout.spans
    count = layout.tensor(spans.tail_counts[spans.rank])[:, None].to(wide)
    share = 1 / count[..., None]
    if spans.tail is not None:
        share = share * layout.tensor(spans.tail)[..., None]
    mean = (m * share).sum(1)
    var = ((s + (m - mean[:, None]).square()) * share).sum(1)
    return torch.stack([mean, var], dim=1)


def pooled(
    reach: Reach, gathered: Tensor, carried: Moments | None, prior: ops.Prior, layout: SpanLayout
) -> tuple[Tensor, Moments]:
    """Count [B] (imagined tokens included), mean and var [B, G] of all that came before a token in its document.

    Args:
        gathered: [R, B, 2, G]; every rank's `tail_moments`.
        carried: the moments before the batch.
    """
    spans, wide = layout.spans, gathered.dtype
    mean_0, var_0 = (value.to(wide).expand_as(gathered[0, :, 0]) for value in (prior.mean, prior.var))
    count_0 = np.full(spans.batch, prior.count)
    if carried is not None:
        going_on = reach.carried & (spans.positions > 0)
        count_0 = np.where(going_on, count_0 + spans.positions, count_0)
        mask = layout.tensor(going_on)[:, None]
        mean_0, var_0 = (torch.where(mask, c.to(wide), v) for c, v in zip(carried, (mean_0, var_0), strict=True))
    counts = np.concatenate([count_0[None], spans.tail_counts * reach.spans])
    n = layout.tensor(counts)[..., None].to(wide)  # [1 + R, B, 1]
    means = torch.cat([mean_0[None], gathered[:, :, 0]])
    variances = torch.cat([var_0[None], gathered[:, :, 1]])
    total = n.sum(0)
    share = n / total.clamp(min=1)
    mean = (share * means).sum(0)
    var = (share * (variances + (means - mean).square())).sum(0)
    empty = total == 0
    count = layout.tensor(counts.sum(0))
    return count, Moments(torch.where(empty, mean_0, mean), torch.where(empty, var_0, var))


def timestep_norm_over_spans(
    norm: TimestepNorm, x: Tensor, carried: Moments | None, layout: SpanLayout, group: Group
) -> tuple[Tensor, Moments]:
    """`TimestepNorm.forward` of a span: x [B, l, D] and the row's carried moments -> (y, the moments after the row)."""
    exchange = Exchange(group)
    with torch.autocast(x.device.type, enabled=False):
        begun = exchange.begin(_computed_again(tail_moments, x, norm.num_groups, layout))
        prior = norm.prior(x.device)
        gathered = exchange.end(begun)
        count, before = pooled(layout.spans.start, gathered, carried, prior, layout)
        y, *_ = ops.timestep_norm(
            x, norm.weight, norm.bias, norm.num_groups, count, *before, eps=norm.eps, prior=prior, layout=layout
        )
        return y, pooled(layout.spans.end, gathered, carried, prior, layout)[1]


# --- CEMA ---------------------------------------------------------------------------------------------------


class CEMAOverSpans:
    """CEMA of a span in two halves, between which the summaries travel.

    Args:
        cema: the module. x: [B, l, D].
        carried: complex [B, D, N]; the row's carried state, or None.
    """

    def __init__(self, cema: CEMA, x: Tensor, carried: Tensor | None, layout: SpanLayout, group: Group) -> None:
        self.carried, self.layout = carried, layout
        with torch.autocast(x.device.type, enabled=False):
            p, self.q, self.gamma = cema.coefficients()
        self.y, own_end = ops.cema(x, p, self.q, self.gamma, cema.omega, None, layout=layout)
        self.exchange = Exchange(group)
        self.begun = self.exchange.begin(own_end)

    def finish(self) -> tuple[Tensor, Tensor]:
        """(y [B, l, D], the state after the row: complex [B, D, N])."""
        layout, spans = self.layout, self.layout.spans
        gathered = self.exchange.end(self.begun)
        h = self._before(spans.start, gathered)
        response = _computed_again(prefix_response, h, self.q, self.gamma, layout.length)
        if spans.head is not None:
            response = response * layout.tensor(spans.head)[..., None]
        return self.y + response.to(self.y.dtype), self._before(spans.end, gathered)

    def _before(self, reach: Reach, gathered: Tensor) -> Tensor:
        """The state before a token, made of the end states [R, B, D, N] of the spans that reach it."""
        spans, layout = self.layout.spans, self.layout
        # Powers in double precision: over a long span the phase of q**distance would lose digits in single.
        distances = layout.tensor(np.maximum(reach.at - np.asarray(spans.borders), 0)).to(torch.float64)
        q = self.q.to(torch.complex128)
        decay = torch.pow(q, distances[:, None, None]).to(self.q.dtype)  # [R + 1, D, N]
        reaching = layout.tensor(reach.spans)[..., None, None]
        h = (gathered * decay[1:, None] * reaching).sum(0)
        if self.carried is not None:
            h = h + self.carried * decay[0] * layout.tensor(reach.carried)[:, None, None]
        return h


def prefix_response(h: Tensor, q: Tensor, gamma: Tensor, length: int) -> Tensor:
    """What a state adds to the tokens after it: `Re(sum_j gamma_j q_j**(t+1) h_j)` for t < length.

    Args:
        h: complex [B, D, N]; q, gamma: complex [D, N].

    Returns:
        real [B, length, D].
    """
    batch, dim, components = h.shape
    size = min(RESPONSE_BLOCK, length)
    count = -(-length // size)
    exponents = torch.arange(count, device=q.device)[:, None, None] * size
    steps = torch.pow(q.to(torch.complex128), exponents).to(q.dtype)  # [n, D, N]
    entering = (h[None] * (gamma * steps)[:, None]).conj().resolve_conj()  # Re(z q) = Re(z) Re(q) - Im(z) Im(q)
    entering = torch.view_as_real(entering).permute(2, 1, 0, 3, 4).reshape(dim, batch * count, 2 * components)
    y = torch.bmm(entering, powers(q, size).transpose(1, 2))  # [D, B n, T]
    return y.permute(1, 2, 0).reshape(batch, count * size, dim)[:, :length]


# --- attention ----------------------------------------------------------------------------------------------


def windows(k: Tensor, v: Tensor, spans: Spans, ranks: list[int], group: Group) -> tuple[Tensor, Tensor]:
    """The keys and values of this rank's window, from the ranks whose spans hold them.

    Args:
        k: [B, l, H, d]; v: [B, l, H, e]; this rank's.
        ranks: the window that each rank asks for, named as in `Spans.window`.

    Returns:
        ([B, w, H, d], [B, w, H, e]).
    """
    heads, width = k.shape[2], k.shape[3] + v.shape[3]
    both = torch.cat([k, v.to(k.dtype)], dim=-1)
    pieces = [both[:, slice(*spans.overlap(spans.rank, rank))] for rank in ranks]
    sent = [piece.numel() for piece in pieces]
    lengths = [high - low for low, high in (spans.overlap(r, ranks[spans.rank]) for r in range(spans.ranks))]
    received = [len(k) * length * heads * width for length in lengths]
    flat = all_to_all(torch.cat([piece.flatten() for piece in pieces]), sent, received, group)
    parts = [part.view(len(k), n, heads, width) for part, n in zip(flat.split(received), lengths, strict=True)]
    keys, values = torch.cat(parts, dim=1).split([k.shape[3], v.shape[3]], dim=-1)
    return keys, values.to(v.dtype)


def tokens_before(
    reach: Reach,
    back: np.ndarray,
    width: int,
    window: tuple[Tensor, Tensor],
    carried: Sequence[tuple[Tensor, Tensor, np.ndarray]],
    layout: SpanLayout,
) -> OpenChunk:
    """Keys and values of `width` tokens from `back` tokens before a token on: the window's, and those that the batch
    before left.

    Args:
        back: int64 [B]; tokens that lie between the first one wanted and the token of `reach`.
        window: keys and values [B, w, H, .] of the row's last w tokens before the token of `reach`.
        carried: what the batch before left, in order of time: keys and values, and how many of them each row has.
    """
    in_window = window[0].shape[1]
    token = reach.at - back[:, None] + np.arange(width)  # the row's token in each place; negative: of the batch before
    widths = [keys.shape[1] for keys, _, _ in carried]
    place = sum(widths) + token - (reach.at - in_window)
    after = np.zeros(layout.spans.batch, dtype=np.int64)  # tokens of the later parts
    for number in reversed(range(len(carried))):
        count, offset = carried[number][2], sum(widths[:number])
        own = (token < -after[:, None]) & (token >= -(after + count)[:, None])
        place = np.where(own, offset + token + (after + count)[:, None], place)
        after = after + count
    index = layout.tensor(place.clip(0, max(sum(widths) + in_window - 1, 0)))  # places of no token are not read

    def pick(new: Tensor, old: list[Tensor]) -> Tensor:
        whole = torch.cat([*(part.to(new.dtype) for part in old), new], dim=1) if sum(widths) else new
        return whole.gather(1, index[..., None, None].expand(-1, -1, *new.shape[2:]))

    return OpenChunk(
        pick(window[0], [keys for keys, _, _ in carried]), pick(window[1], [values for _, values, _ in carried])
    )


def open_chunk_at(
    reach: Reach, window: tuple[Tensor, Tensor], carried: OpenChunk | None, layout: SpanLayout
) -> OpenChunk:
    """The chunk that is open before a token: the window's part of it, after what the batch before left of it."""
    spans = layout.spans
    left = reach.position % spans.chunk_size  # tokens of the open chunk, by row
    parts = []
    if carried is not None:
        count = spans.positions % spans.chunk_size
        width = int(count.max(initial=0))
        parts = [(carried.keys[:, :width], carried.values[:, :width], count)]
    return tokens_before(reach, left, int(left.max(initial=0)), window, parts, layout)


def own_window(k: Tensor, v: Tensor, spans: Spans, group: Group) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """((keys, values) [B, w, H, .] of this rank's window, v): all ranks' windows are exchanged at once, where any has
    one."""
    ranks = list(range(spans.ranks))
    if not any(spans.window(rank)[0] < spans.window(rank)[1] for rank in ranks):  # known to all ranks alike
        return (k[:, :0], v[:, :0]), v
    window = windows(k, v, spans, ranks, group)
    # Others may have asked for this rank's keys: for their gradients to come back, its graph needs the exchange.
    return window, v + window[1].sum() * 0


def last_window(k: Tensor, v: Tensor, spans: Spans, group: Group) -> tuple[Tensor, Tensor]:
    """Keys and values [B, w, H, .] of the row's last window, on every rank."""
    first, last = spans.window(spans.ranks)
    if first == last:
        return k[:, :0], v[:, :0]
    return windows(k, v, spans, [spans.ranks] * spans.ranks, group)


def attention_prefix(
    k: Tensor, v: Tensor, carried: OpenChunk | None, layout: SpanLayout, group: Group
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Keys and values [B, n, H, .] of the chunk that is open before this rank's span (None where none is), and v."""
    spans = layout.spans
    window, v = own_window(k, v, spans, group)
    if not (spans.start.position % spans.chunk_size).any():
        return None, None, v
    return *open_chunk_at(spans.start, window, carried, layout), v


def open_chunk_after(k: Tensor, v: Tensor, carried: OpenChunk | None, layout: SpanLayout, group: Group) -> OpenChunk:
    """The chunk that is open after the row, on every rank, without a history."""
    window = last_window(k.detach(), v.detach(), layout.spans, group)
    return open_chunk_at(layout.spans.end, window, None if carried is None else carried.detach(), layout)
