"""The last n tokens of each row, carried from piece to piece: what windows and short convolutions look back at.

They stand right-aligned, [B, n, ...], the newest last; places that a row's document has not filled yet are zero.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megalodon.ops.layout import Layout


def with_recent(recent: Tensor | None, x: Tensor, count: int) -> Tensor:
    """x [B, L, ...] with the `count` tokens before it in front: [B, count + L, ...], in the dtype of x."""
    if recent is None:
        recent = x.new_zeros(x.shape[0], count, *x.shape[2:])
    return torch.cat([recent.to(x.dtype), x], dim=1)


def recent_after(joined: Tensor, count: int, layout: Layout) -> Tensor:
    """The last `count` tokens of each row's last document, from the result of `with_recent`: [B, count, ...]."""
    if layout.plain:
        return joined[:, layout.length :].clone()
    places = layout.lengths[:, None] + np.arange(count)
    rows = torch.arange(layout.batch, device=joined.device)[:, None]
    last = joined[rows, torch.from_numpy(places).to(joined.device)]
    if layout.starts is None:
        return last
    ends = np.maximum(layout.lengths - 1, 0)
    begins = layout.document_start[np.arange(layout.batch), ends]
    foreign = (begins[:, None] > 0) & (places < count + begins[:, None])
    return last.masked_fill(torch.from_numpy(foreign).to(joined.device).view(*foreign.shape, *[1] * (last.ndim - 2)), 0)


def delayed(joined: Tensor, count: int, by: int, layout: Layout) -> Tensor:
    """From the result of `with_recent`, x delayed by `by` <= `count` tokens, zero where the document is younger."""
    x = joined[:, count - by : count - by + layout.length]
    if layout.starts is None or by == 0:
        return x
    young = torch.from_numpy(np.arange(layout.length) - layout.document_start < by)
    young &= torch.from_numpy(layout.document_start > 0)  # what was carried belongs to the first document
    return x.masked_fill(young.to(x.device).view(*young.shape, *[1] * (x.ndim - 2)), 0)
