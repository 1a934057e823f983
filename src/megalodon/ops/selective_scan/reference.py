"""The selective scan by its definition: one recurrence, one token at a time. Any dtype, any device."""

from __future__ import annotations

import torch
from torch import Tensor

from megalodon.ops.layout import Layout


def selective_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor | None,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None,
    initial_state: Tensor,
    layout: Layout,
) -> tuple[Tensor, Tensor]:
    """`h_t = exp(dt_t a) h_{t-1} + (dt_t x_t) b_t`, `y_t = c_t . h_t + skip x_t`; see `ops.selective_scan`."""
    starts, lengths = layout.starts, torch.from_numpy(layout.lengths).to(x.device)
    per_channel = x.ndim == 3
    h = initial_state
    outputs = []
    for t in range(x.shape[1]):
        if starts is not None:
            h = _where(torch.from_numpy(~starts[:, t]).to(x.device), h, torch.zeros_like(h))
        b_t, c_t = b[:, t], c[:, t]
        if per_channel:
            assert a is not None
            decay = torch.exp(dt[:, t, :, None] * a)
            written = (dt[:, t] * x[:, t])[..., None] * b_t[:, None]
            c_t = c_t[:, None]
        else:
            decay = torch.exp(dt[:, t] if a is None else dt[:, t] * a)[..., None, None]
            weighted = x[:, t] if a is None else dt[:, t, :, None] * x[:, t]
            heads = x.shape[2] // b.shape[2]
            written = weighted[..., None] * b_t.repeat_interleave(heads, dim=1)[:, :, None]
            c_t = c_t.repeat_interleave(heads, dim=1)[:, :, None]
        advanced = decay * h + written
        is_token = t < lengths
        h = _where(is_token, advanced, h)
        y = (advanced * c_t).sum(-1)
        if skip is not None:
            y = y + (skip if per_channel else skip[:, None]) * x[:, t]
        outputs.append(_where(is_token, y, torch.zeros_like(y)))
    return (torch.stack(outputs, dim=1) if outputs else x), h


def _where(rows: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return torch.where(rows.reshape(-1, *[1] * (one.ndim - 1)), one, other)
