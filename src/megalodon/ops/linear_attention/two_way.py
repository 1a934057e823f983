"""Linear attention that sees both sides of its document, or another sequence: sums without an order.

Without decays, every token reads the same sums. With decays, the state runs from either side, and the token itself,
which both sides count, is taken off once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalodon.ops.layout import Layout, document_numbers, layout_of
from megalodon.ops.linear_attention.blocked import linear_attention


def both_sides(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    normalise: bool,
    eps: float,
    layout: Layout,
) -> Tensor:
    """Features q [B, L, H, f], k [B, L, G, f] and values v [B, L, G, e] -> [B, L, H, e]."""
    if log_decay is None and layout.starts is None:
        return across(q, k, v, layout.padding, normalise, eps)
    documents = document_numbers(layout)
    groups = q.shape[2] // k.shape[2]
    constant = log_decay is not None and log_decay.ndim == 1

    def one_side(flipped: bool) -> tuple[Tensor, Tensor | None]:
        def turn(x: Tensor) -> Tensor:
            return x.flip(1) if flipped else x

        decay = log_decay if log_decay is None or constant else turn(log_decay)
        places = layout_of(q.shape[0], q.shape[1], q.device, segment_ids=turn(documents))
        numerator, denominator, _, _ = linear_attention(turn(q), turn(k), turn(v), decay, None, normalise, None, places)
        return turn(numerator), None if denominator is None else turn(denominator)

    (before, weights_before), (after, weights_after) = one_side(False), one_side(True)
    own = (q.unflatten(2, (-1, groups)) * k[:, :, :, None]).sum(-1)
    numerator = before + after - (own[..., None] * v[:, :, :, None]).flatten(2, 3)
    if weights_before is None or weights_after is None:
        return numerator
    return numerator / (weights_before + weights_after - own.flatten(2, 3) + eps)[..., None]


def across(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, normalise: bool, eps: float) -> Tensor:
    """Every query [B, L, H, f] reads all of another sequence, k [B, M, G, f] and v [B, M, G, e]; `hidden` bool [B, M]
    are no keys."""
    if hidden is not None:
        k = k.masked_fill(hidden[..., None, None], 0)
    groups = q.shape[2] // k.shape[2]
    queries = q.unflatten(2, (-1, groups))
    numerator = torch.einsum("blgrf,bgfe->blgre", queries, torch.einsum("bmgf,bmge->bgfe", k, v)).flatten(2, 3)
    if not normalise:
        return numerator
    return numerator / (torch.einsum("blgrf,bgf->blgr", queries, k.sum(1)).flatten(2, 3) + eps)[..., None]
