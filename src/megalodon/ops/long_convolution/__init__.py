"""Causal convolutions with one kernel a channel: as long as the sequence (Hyena, arXiv 2302.10866), or a few taps."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megalodon.ops.backend import Implementations, check_devices, choose, full_precision
from megalodon.ops.compiling import one_break_at_most
from megalodon.ops.layout import Layout, layout_of
from megalodon.ops.long_convolution import blocked, reference

IMPLEMENTATIONS: Implementations = {"reference": reference.long_convolution, "blocked": blocked.long_convolution}


@one_break_at_most
def long_convolution(
    x: Tensor,
    kernel: Tensor,
    skip: Tensor | None = None,
    history: Tensor | None = None,
    segment_ids: Tensor | None = None,
    backend: str | None = None,
    *,
    layout: Layout | None = None,
) -> tuple[Tensor, Tensor]:
    """`y_t = sum_{j < M} kernel_j x_{t-j} + skip x_t`, over the tokens of t's document.

    Computed in float32 (float64 for float64 input), under autocast too.

    Args:
        x: [B, L, D], any floating dtype.
        kernel: [D, M]; kernel[:, 0] multiplies the token itself.
        skip: [D]; None: no skip.
        history: [B, n, D]; the inputs before the first token, the latest last; zeros in front where a row has fewer
            than n. None: nothing was before.
        segment_ids: int [B, L]; a change along L starts a document, which sees nothing before it. The row's first
            document continues `history`.
        backend: "reference" or "blocked"; None chooses (see `megalodon.ops.backend`).
        layout: the batch's layout, in place of `segment_ids`. Tokens beyond its `lengths` give zero and do not enter
            the history.

    Returns:
        (y [B, L, D] in the dtype of x; the history after each row's last token [B, min(M - 1, n + L), D], in the
        dtype of x).

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
    """
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}: it must be a floating-point [B, L, D]")
    check_devices(x.device, kernel=kernel, skip=skip, history=history)
    batch, length, dim = x.shape
    if kernel.ndim != 2 or kernel.shape[0] != dim or kernel.shape[1] == 0:
        raise ValueError(f"kernel has shape {tuple(kernel.shape)}: it must be [D, M] with D = {dim} and M at least 1")
    if skip is not None and skip.shape != (dim,):
        raise ValueError(f"skip has shape {tuple(skip.shape)}: it must have D = {dim} values")
    if history is None:
        history = x.new_zeros(batch, 0, dim)
    if history.ndim != 3 or history.shape[::2] != (batch, dim):
        raise ValueError(f"history has shape {tuple(history.shape)}: it must be [{batch}, n, {dim}]")
    run = choose(IMPLEMENTATIONS, backend, x.device, x.dtype)
    if layout is None:
        layout = layout_of(batch, length, x.device, segment_ids=segment_ids)
    real = full_precision(x.dtype)
    history = history.to(x.dtype)[:, max(history.shape[1] - kernel.shape[1] + 1, 0) :]
    with torch.autocast(x.device.type, enabled=False):
        y = run(x.to(real), kernel.to(real), history.to(real), layout)
        if skip is not None:
            padding = layout.padding
            y = torch.addcmul(y, x.to(real) if padding is None else x.to(real).masked_fill(padding[..., None], 0), skip)
        return y.to(x.dtype), _after(x, history, kernel.shape[1] - 1, layout)


def _after(x: Tensor, history: Tensor, longest: int, layout: Layout) -> Tensor:
    """The last inputs of each row's last document, at most `longest`."""
    before, length = history.shape[1], x.shape[1]
    inputs = torch.cat([history, x], dim=1)
    width = min(longest, before + length)
    if layout.plain:
        return inputs[:, before + length - width :]
    rows = np.arange(len(x))
    end = before + layout.lengths
    start = layout.document_start[rows, np.maximum(layout.lengths - 1, 0)] if length else np.zeros_like(rows)
    index = end[:, None] - width + np.arange(width)
    valid = index >= np.where(start > 0, before + start, 0)[:, None]
    chosen = torch.from_numpy(index.clip(0)).to(x.device)[..., None].expand(-1, -1, x.shape[2])
    return inputs.gather(1, chosen) * torch.from_numpy(valid).to(x.device)[..., None]
