"""Chunk parallelism of decaying statistics, attention over two chunks, and the working memory: nobody waits in line.

- TimestepDecayNorm: a span multiplies the averages by `beta**tokens` and adds its own, so spans join in any grouping.
- The window: each rank fetches the keys and values of up to two chunks before its span.
- The working memory is an affine map of what was before: a span turns M into `P M + Q`, P [d, d] and Q [d, e] a head.
  P and Q depend on what was before through its log mass only, which is a sum over tokens: those travel first, one
  [H, d] for each pair of ranks. Then each rank runs its span once, with the columns of the identity beside the values,
  which gives what its tokens read, P and Q in one pass; (P, Q) travel; and what came before is added to the reads.

A layer sends one [2, G], one [R, H, d] and one [H, d, d + e] a rank and row, whatever the length, and its windows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from megalodon import ops
from megalodon.models.layers.open_chunk import OpenChunk
from megalodon.models.layers.timestep_decay_norm import DecayedMoments, TimestepDecayNorm
from megalodon.models.layers.window import Window
from megalodon.models.layers.window_attention import Found, Queries
from megalodon.ops.backend import accumulator_dtype, full_precision
from megalodon.ops.timestep_decay_norm import Decay, DecayedStatistics, decayed_statistics, joined
from megalodon.parallel.chunk import last_window, own_window, tokens_before
from megalodon.parallel.collectives import Exchange, Group
from megalodon.parallel.spans import Reach, SpanLayout

NOTHING = -1e30
"""A log mass that stands for none in sums."""


def timestep_decay_norm_over_spans(
    norm: TimestepDecayNorm, x: Tensor, carried: DecayedMoments | None, layout: SpanLayout, group: Group
) -> tuple[Tensor, DecayedMoments]:
    """`TimestepDecayNorm.forward` of a span: x [B, l, D] and the row's carried moments -> (y, the moments after it)."""
    spans, decay = layout.spans, Decay(norm.beta1, norm.beta2)
    exchange = Exchange(group)
    with torch.autocast(x.device.type, enabled=False):
        own = decayed_statistics(x, norm.num_groups, norm.beta1, norm.beta2, layout=layout)
        gathered = exchange.end(exchange.begin(torch.stack([own.mean, own.var], dim=1)))  # [R, B, 2, G]
        state = DecayedStatistics.fresh(len(x), norm.num_groups, accumulator_dtype(x.device), x.device)
        if carried is not None:
            seen = layout.tensor(spans.positions > 0)
            state = DecayedStatistics(
                torch.where(seen, carried.count, 0), *(torch.where(seen[:, None], old, 0) for old in carried[1:])
            )
        before = state
        for rank in range(spans.ranks):
            if rank == spans.rank:
                before = state
            span = DecayedStatistics(layout.tensor(spans.tail_counts[rank]), *gathered[rank].unbind(1))
            state = joined(state, span, layout.tensor(spans.restarted[rank]), decay)
        fresh = layout.tensor(spans.start.position == 0)  # a document begins with this span
        before = DecayedStatistics(
            before.count.masked_fill(fresh, 0), *(old.masked_fill(fresh[:, None], 0) for old in before[1:])
        )
        y, *_ = ops.timestep_decay_norm(
            x,
            norm.weight,
            norm.bias,
            norm.num_groups,
            norm.beta1,
            norm.beta2,
            before.count,
            _needing(before.mean, gathered),
            before.var,
            eps=norm.eps,
            layout=layout,
        )
        return y, DecayedMoments(*state)


def window_attention_over_spans(
    queries: Queries,
    v: Tensor,
    carried: Window | None,
    layout: SpanLayout,
    group: Group,
    use_cache: bool,
    dropout: float,
    dropkey: bool,
) -> tuple[Found, Window | None]:
    """What attention and the working memory give for this rank's span, and the window after the row, on every rank."""
    spans, size = layout.spans, layout.spans.chunk_size
    keys, width = queries.keys, queries.k.shape[-1]
    after = None
    if use_cache:
        last = last_window(keys.detach(), v.detach(), spans, group)
        after = _window_at(spans.end, last, None if carried is None else carried.detach(), layout)
    window, v = own_window(keys, v, spans, group)
    before, opened = _window_at(spans.start, window, carried, layout)
    prefix = {"before_k": before.keys, "before_v": before.values, "open_k": opened.keys, "open_v": opened.values}
    given = {name: x if x.shape[1] else None for name, x in prefix.items()}

    def part(columns: slice) -> dict[str, Any]:
        return {name: x if x is None or name.endswith("v") else x[..., columns] for name, x in given.items()}

    o = ops.sliding_chunk_attention(
        queries.q,
        queries.k,
        v,
        size,
        q_before=queries.before,
        **part(slice(0, width)),
        dropout=dropout,
        dropkey=dropkey,
        layout=layout,
    )
    w, memory, log_mass = _working_memory(queries, v, part(slice(width, None)), carried, layout, group)
    if after is None:
        return Found(o, w), None
    nowhere = torch.full((spans.batch,), -1, dtype=torch.int64, device=v.device)
    return Found(o, w), Window(after[1], after[0], memory.detach(), log_mass.detach(), nowhere, nowhere)


def _window_at(
    reach: Reach, window: tuple[Tensor, Tensor], carried: Window | None, layout: SpanLayout
) -> tuple[OpenChunk, OpenChunk]:
    """(the chunk before, the open chunk) before a token."""
    spans, size = layout.spans, layout.spans.chunk_size
    parts = []
    if carried is not None:
        has_before, count = np.where(spans.positions >= size, size, 0), spans.positions % size
        whole, filled = int(has_before.max(initial=0)), int(count.max(initial=0))
        parts = [
            (carried.before.keys[:, :whole], carried.before.values[:, :whole], has_before),
            (carried.open.keys[:, :filled], carried.open.values[:, :filled], count),
        ]
    left = reach.position % size
    opened = tokens_before(reach, left, int(left.max(initial=0)), window, parts, layout)
    width = size if (reach.position >= size).any() else 0
    return tokens_before(reach, left + size, width, window, parts, layout), opened


def _working_memory(
    queries: Queries,
    v: Tensor,
    prefix: dict[str, Any],
    carried: Window | None,
    layout: SpanLayout,
    group: Group,
) -> tuple[Tensor, Tensor, Tensor]:
    """(what the span's tokens read [B, l, H, e], M [B, H, d, e] and u [B, H, d] after the row)."""
    spans = layout.spans
    batch, length, heads, dim = queries.memory_k.shape
    wide = full_precision(v.dtype)
    with torch.autocast(v.device.type, enabled=False):
        masses = _log_masses(queries.memory_k.to(wide), carried, layout, group)
        identity = torch.eye(dim, dim + v.shape[-1], dtype=wide, device=v.device).expand(batch, heads, -1, -1)
        beside = torch.cat([v.new_zeros(batch, length, heads, dim), v], dim=-1)
        pad = {name: x for name, x in prefix.items() if x is not None}
        for name in ("before_v", "open_v"):
            if name in pad:
                pad[name] = torch.cat([pad[name].new_zeros(*pad[name].shape[:-1], dim), pad[name]], dim=-1)
        read, both, _ = ops.working_memory(
            queries.memory_q,
            queries.memory_k,
            beside.to(wide),
            spans.chunk_size,
            memory=_needing(identity, masses[spans.rank]),
            log_mass=masses[spans.rank],
            layout=layout,
            **pad,
        )
        exchange = Exchange(group)
        gathered = exchange.end(exchange.begin(both))  # [R, B, H, d, d + e]
        decay, added = gathered.split([dim, v.shape[-1]], dim=-1)
        state = v.new_zeros(batch, heads, dim, v.shape[-1], dtype=wide)
        if carried is not None:
            seen = layout.tensor(spans.positions >= 2 * spans.chunk_size)[:, None, None, None]
            state = torch.where(seen, carried.memory.to(wide), 0)
        before = state
        for rank in range(spans.ranks):
            if rank == spans.rank:
                before = state
            state = torch.matmul(decay[rank], state) + added[rank]
        of_before, own = read.split([dim, v.shape[-1]], dim=-1)
        found = torch.einsum("blhd,bhde->blhe", of_before, _needing(before, gathered)) + own
    return found.to(v.dtype), state, masses[spans.ranks]


def _log_masses(k: Tensor, carried: Window | None, layout: SpanLayout, group: Group) -> list[Tensor]:
    """For each rank, and last for the end of the row: the log mass [B, H, d] of all that has left the window there.

    A sum over tokens: each rank's own tokens are summed up for every rank after it, and the sums travel.
    """
    spans, size = layout.spans, layout.spans.chunk_size
    reaches = [spans.reach(rank) for rank in range(spans.ranks + 1)]
    index = np.arange(spans.own.start, spans.own.stop)
    own = []
    for reach in reaches:
        # the document's tokens up to the chunk before the one that is open: they have left the window
        last = reach.at - reach.position % size - size
        first = np.where(reach.carried, -1, reach.at - reach.position)
        counted = (index >= first[:, None]) & (index < last[:, None])
        hidden = layout.tensor(~counted)[..., None, None]
        own.append(torch.logsumexp(k.masked_fill(hidden, -torch.inf), dim=1))
    exchange = Exchange(group)
    gathered = exchange.end(exchange.begin(torch.stack(own)))  # [R, R + 1, B, H, d]
    found = []
    for rank, reach in enumerate(reaches):
        parts = list(gathered[:, rank].unbind())
        if carried is not None:
            parts += _carried_masses(k, carried, reach, layout)
        found.append(_sum_of_masses(parts))
    return found


def _sum_of_masses(parts: list[Tensor]) -> Tensor:
    """Their log-sum-exp, -inf where all are, with gradients that are zero there and not undefined."""
    total = torch.logsumexp(torch.stack(parts).clamp(min=NOTHING), dim=0)
    return torch.where(total > NOTHING / 2, total, -torch.inf)


def _needing(x: Tensor, exchanged: Tensor) -> Tensor:
    """x, whose gradient now goes through an exchange whether this rank has used it or not: all ranks join in each."""
    return x + (exchanged.clamp(min=NOTHING) * 0).sum().to(x.dtype)


def _carried_masses(k: Tensor, carried: Window, reach: Reach, layout: SpanLayout) -> list[Tensor]:
    """What the batch before left of a document that still goes on: its log mass, and that of its window's tokens that
    have left since."""
    spans, size = layout.spans, layout.spans.chunk_size
    dim = k.shape[-1]
    goes_on = reach.carried & (reach.position >= 2 * size)
    old = layout.tensor(goes_on & (spans.positions >= 2 * size))[:, None, None]
    parts = [carried.log_mass.to(k.dtype).masked_fill(~old, -torch.inf)]
    count = spans.positions % size
    last = reach.at - reach.position % size - size  # in tokens of this batch; negative: in what was carried
    for chunk, first, held in (
        (carried.before, -count - size, np.where(spans.positions >= size, size, 0)),
        (carried.open, -count, count),
    ):
        width = int(held.max(initial=0))
        if width:
            place = np.arange(width)
            counted = goes_on[:, None] & (place < held[:, None]) & (first[:, None] + place < last[:, None])
            hidden = layout.tensor(~counted)[..., None, None]
            keys = chunk.keys[:, :width, :, dim:].to(k.dtype)
            parts.append(torch.logsumexp(keys.masked_fill(hidden, -torch.inf), dim=1))
    return parts
