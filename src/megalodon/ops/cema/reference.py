"""CEMA by its definition: one complex recurrence per channel and component, one token at a time. Any dtype, any
device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalodon.ops.backend import full_precision
from megalodon.ops.layout import Layout


def cema(
    x: Tensor, p: Tensor, q: Tensor, gamma: Tensor, omega: Tensor | None, initial_state: Tensor | None, layout: Layout
) -> tuple[Tensor, Tensor]:
    """`h_t = q h_{t-1} + p x_t`, `y_t = Re(sum_j gamma_j h_{t,j}) + omega x_t`; see `megalodon.ops.cema`."""
    real = full_precision(x.dtype)
    batch, length, dim = x.shape
    u = x.to(real)
    h = initial_state
    if h is None:
        h = torch.zeros(batch, dim, p.shape[-1], dtype=real.to_complex(), device=x.device)
    starts, lengths = layout.starts, torch.from_numpy(layout.lengths).to(x.device)
    outputs = []
    for t in range(length):
        if starts is not None:
            h = h.masked_fill(torch.from_numpy(starts[:, t]).to(x.device)[:, None, None], 0)
        advanced = q * h + p * u[:, t, :, None]
        is_token = t < lengths
        h = torch.where(is_token[:, None, None], advanced, h)
        y = (gamma * advanced).real.sum(-1)
        if omega is not None:
            y = y + omega * u[:, t]
        outputs.append(torch.where(is_token[:, None], y, 0))
    y = torch.stack(outputs, dim=1) if outputs else u
    return y.to(x.dtype), h
