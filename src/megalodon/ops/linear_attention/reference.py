"""Linear attention by its definition: one step a token. Any dtype, any device."""

from __future__ import annotations

import torch
from torch import Tensor

from megalodon.ops.layout import Layout, document_numbers


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    normalise: bool,
    start: tuple[Tensor, Tensor | None] | None,
    layout: Layout,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Features q, k and values in the dtype of the sums -> (numerator [B, L, H, e], denominator [B, L, H] or None, the
    sums and the weights after each row's last token). See `megalodon.ops.linear_attention`."""
    batch, length, heads = q.shape[:3]
    groups, features = k.shape[2:]
    sums = q.new_zeros(batch, groups, features, v.shape[3]) if start is None else start[0]
    weights = q.new_zeros(batch, groups, features) if start is None or start[1] is None else start[1]
    starts, lengths = layout.starts, torch.from_numpy(layout.lengths).to(q.device)
    decay = q.new_ones(batch, length, groups, 1)
    if log_decay is not None:
        decay = log_decay.exp()
        decay = decay.expand(batch, length, -1) if decay.ndim == 1 else decay
        decay = decay[..., None] if decay.ndim == 3 else decay
    above, below = [], []
    for t in range(length):
        if starts is not None:
            fresh = torch.from_numpy(starts[:, t]).to(q.device)
            sums, weights = (
                sums.masked_fill(fresh[:, None, None, None], 0),
                weights.masked_fill(fresh[:, None, None], 0),
            )
        old, written = decay[:, t, :, :, None] * sums, v[:, t]
        if beta is not None:
            written = beta[:, t, :, None] * (written - torch.einsum("bgfe,bgf->bge", old, k[:, t]))
        new = old + k[:, t, :, :, None] * written[:, :, None]
        new_weights = decay[:, t] * weights + k[:, t]
        real = t < lengths
        sums = torch.where(real[:, None, None, None], new, sums)
        weights = torch.where(real[:, None, None], new_weights, weights)
        queries = q[:, t].unflatten(1, (groups, -1))
        above.append(torch.einsum("bgrf,bgfe->bgre", queries, new).flatten(1, 2))
        below.append(torch.einsum("bgrf,bgf->bgr", queries, new_weights).flatten(1, 2))
    numerator = torch.stack(above, 1) if above else q.new_zeros(batch, 0, heads, v.shape[3])
    if not normalise:
        return numerator, None, sums, None
    return numerator, torch.stack(below, 1) if below else q.new_zeros(batch, 0, heads), sums, weights


def both_sides(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, normalise: bool, eps: float, layout: Layout
) -> Tensor:
    """The two-way form: the whole matrix of weights, token by token. See `megalodon.ops.two_way_linear_attention`."""
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, 2) for x in (k, v))
    length = q.shape[1]
    decay = q.new_zeros(*k.shape[:3], 1)
    if log_decay is not None:
        decay = log_decay.expand(*k.shape[:2], -1) if log_decay.ndim == 1 else log_decay
        decay = (decay if decay.ndim == 4 else decay[..., None]).repeat_interleave(groups, 2)
    sums = decay.cumsum(1)
    shifted = torch.cat([torch.zeros_like(sums[:, :1]), sums[:, :-1]], 1)
    weights = q.new_zeros(q.shape[0], q.shape[2], length, length)
    documents = document_numbers(layout)
    for t in range(length):
        for j in range(length):
            lost = sums[:, t] - sums[:, j] if j <= t else shifted[:, j] - shifted[:, t]
            same = (documents[:, t] == documents[:, j])[:, None]
            weights[:, :, t, j] = (q[:, t] * lost.exp() * k[:, j]).sum(-1) * same
    out = torch.einsum("bhtj,bjhe->bthe", weights, v)
    return out / (weights.sum(-1).transpose(1, 2) + eps)[..., None] if normalise else out
