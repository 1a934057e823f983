"""Mamba-2's scan, one decay per head, in chunks: masked matrix products inside a chunk, a state between chunks.

Inside a chunk of T tokens, token s reaches token t with weight (c_t . b_s) exp(l_{s+1} + .. + l_t), l the logs of the
decays. The sums are differences of one running sum, which is taken in float64: a strong decay early in a chunk costs
the later ones nothing. Where s > t, or another document begins between them, the weight is masked before it is
exponentiated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from megalodon.ops.backend import accumulator_dtype
from megalodon.ops.spans import over_spans

CHUNK = 64
"""Tokens in a chunk: the products inside grow with it, the steps between chunks shrink with it."""

SPAN = 16 * CHUNK
"""Tokens of a row whose tables live at once."""


def _chunks(value: Tensor, size: int) -> Tensor:
    """[B, L, ...] -> [B, n, T, ...]."""
    return value.unflatten(1, (-1, size))


def _one_span(sequences: Sequence[Tensor | None], state: Tensor) -> tuple[Tensor, Tensor]:
    """x [B, l, H, P], log decays [B, l, H], b, c [B, l, G, N], starts bool [B, l] or None; state [B, H, P, N]."""
    x, log_decay, b, c, starts = sequences
    assert x is not None and log_decay is not None and b is not None and c is not None
    length, heads, groups = x.shape[1], x.shape[2], b.shape[2]
    size = min(CHUNK, length)
    if length % size:
        fill = size - length % size  # tokens that write nothing and decay nothing
        x, log_decay, b, c = (F.pad(v, (0, 0) * (v.ndim - 2) + (0, fill)) for v in (x, log_decay, b, c))
        starts = None if starts is None else F.pad(starts, (0, fill))
    x = _chunks(x, size).transpose(2, 3)  # [B, n, H, T, P]
    b, c = (_chunks(v, size).transpose(2, 3) for v in (b, c))  # [B, n, G, T, N]
    sums = _chunks(log_decay, size).transpose(2, 3).to(accumulator_dtype(x.device)).cumsum(-1)
    visible = torch.ones(size, size, dtype=torch.bool, device=x.device).tril()
    number = None
    if starts is not None:
        number = _chunks(starts, size).cumsum(-1)[:, :, None]  # of the token's document inside its chunk
        visible = visible & (number[..., :, None] == number[..., None, :])
    between = (sums[..., :, None] - sums[..., None, :]).to(x.dtype)
    weights = between.masked_fill_(~visible, -torch.inf).exp_()
    weights = (c @ b.mT).unsqueeze(3) * weights.unflatten(2, (groups, -1))  # [B, n, G, H/G, T, T]
    y = weights.flatten(2, 3) @ x

    entering = sums.to(x.dtype).exp()
    leaving = (sums[..., -1:] - sums).to(x.dtype).exp()
    decay = entering[..., -1]
    if number is not None:
        entering = entering * (number == 0)
        leaving = leaving * (number == number[..., -1:])
        decay = decay * (number[..., -1] == 0)
    per_group = (heads // groups,)
    added = (x * leaving[..., None]).mT.unflatten(2, (groups, *per_group)) @ b.unsqueeze(3)
    states = [state]
    for i in range(x.shape[1]):
        states.append(torch.addcmul(added[:, i].flatten(1, 2), decay[:, i, :, None, None], states[-1]))
    before = torch.stack(states[:-1], dim=1).unflatten(2, (groups, *per_group))
    read = (c.unsqueeze(3) @ before.mT).flatten(2, 3)
    y = torch.addcmul(y, read, entering[..., None])
    return y.transpose(2, 3).flatten(1, 2)[:, :length], states[-1]


def scan(
    x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, state: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """All tokens of all rows.

    Args:
        x: [B, L, H, P]; what is written, 0 at padding.
        log_decay: [B, L, H]; 0 at padding.
        b, c: [B, L, G, N].
        state: [B, H, P, N].
        starts: bool [B, L]; the token starts a document. None: none does.
    """
    if x.shape[1] == 1:
        heads = x.shape[2] // b.shape[2]
        b_t, c_t = (v[:, 0].repeat_interleave(heads, dim=1) for v in (b, c))
        decay = log_decay[:, 0].exp()
        if starts is not None:
            decay = decay * ~starts
        h = torch.addcmul(x[:, 0, :, :, None] * b_t[:, :, None], decay[..., None, None], state)
        return (h @ c_t[..., None])[:, None, ..., 0], h
    sequences = (x, log_decay, b, c, starts)
    if x.shape[1] <= CHUNK or not torch.is_grad_enabled():
        outputs = []
        for first in range(0, x.shape[1], SPAN):
            y, state = _one_span([None if s is None else s[:, first : first + SPAN] for s in sequences], state)
            outputs.append(y)
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), state
    return over_spans(_one_span, SPAN, state, sequences)
