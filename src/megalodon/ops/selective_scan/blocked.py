"""The selective scan in blocks: `diagonal` for a decay per channel and component, `scalar` for a decay per head."""

from __future__ import annotations

import torch
from torch import Tensor

from megalodon.ops.layout import Layout
from megalodon.ops.selective_scan import diagonal, scalar


def selective_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor | None,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None,
    initial_state: Tensor,
    layout: Layout,
    kind: type[scalar.Span] = scalar.Span,
) -> tuple[Tensor, Tensor]:
    """See `megalodon.ops.selective_scan`; `kind`: how spans are computed where there is one decay a head."""
    if x.shape[1] == 0:
        return x, initial_state
    starts = None if layout.starts is None else torch.from_numpy(layout.starts).to(x.device)
    padding = layout.padding
    if padding is not None:
        hidden = padding.reshape(*padding.shape, *[1] * (x.ndim - 2))
        dt, x = dt.masked_fill(padding[..., None], 0), x.masked_fill(hidden, 0)
    if x.ndim == 3:
        assert a is not None
        y, state = diagonal.scan(x, dt, a, b, c, initial_state, None if starts is None else (~starts).to(x.dtype))
        y = y if skip is None else torch.addcmul(y, skip, x)
    else:
        y, state = scalar.scan(x, dt, a, b, c, skip, initial_state, starts, kind)
    return (y if padding is None else y.masked_fill(hidden, 0)), state
