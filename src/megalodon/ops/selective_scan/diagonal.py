"""Mamba's scan, one decay per channel and component, in blocks of tokens with little memory.

Inside a block all decays and inputs are computed at once; the recurrence is then one multiply-add a token, written in
place. Only the state that enters each block is kept for backward, which computes the block again. Nothing is ever
divided by a decay, nor multiplied over more than one token, so the form is as exact as the definition.

Here time comes first and channels last: [L, B, N, E].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_NUMBERS = 2**18
"""Numbers in a block's table of decays: what the caches of a core hold, with the states beside it."""

LONGEST_BLOCK = 64


def block_length(batch: int, channels: int, components: int) -> int:
    """Tokens in a block."""
    return max(4, min(LONGEST_BLOCK, BLOCK_NUMBERS // max(batch * channels * components, 1)))


class _Tables:
    """The decays and states of one block, in memory that all blocks of a pass share."""

    def __init__(self, like: Tensor, size: int, components: int) -> None:
        _, batch, channels = like.shape
        self.decay = like.new_empty(size, batch, components, channels)
        self.states = like.new_empty(size + 1, batch, components, channels)

    def fill(
        self, dt: Tensor, a: Tensor, written: Tensor, b: Tensor, keep: Tensor | None, entering: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(decays [T, B, N, E], states around the tokens [T + 1, B, N, E]) of a block of T tokens."""
        length = len(dt)
        decay, states = self.decay[:length], self.states[: length + 1]
        torch.mul(dt[:, :, None], a, out=decay).exp_()
        if keep is not None:
            decay *= keep
        torch.mul(b[..., None], written[:, :, None], out=states[1:])
        states[0] = entering
        for t in range(length):
            states[t + 1].addcmul_(decay[t], states[t])
        return decay, states


class _Diagonal(torch.autograd.Function):
    """x, dt [L, B, E]; a [N, E]; b, c [L, B, N]; entering [B, N, E]; keep [L, B, 1, 1] or None."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, keep: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        length, batch, channels = x.shape
        size = block_length(batch, channels, len(a))
        tables = _Tables(x, min(size, length), len(a))
        y = torch.empty_like(x)
        entering = x.new_empty(-(-length // size), batch, len(a), channels)
        for i, start in enumerate(range(0, length, size)):
            span = slice(start, start + size)
            entering[i] = state
            kept = None if keep is None else keep[span]
            _, states = tables.fill(dt[span], a, dt[span] * x[span], b[span], kept, entering[i])
            torch.matmul(c[span, :, None], states[1:], out=y[span, :, None])
            state = states[-1]
        ctx.save_for_backward(x, dt, a, b, c, entering, keep)
        ctx.set_materialize_grads(False)
        return y, state.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, d_state: Tensor | None):
        x, dt, a, b, c, entering, keep = ctx.saved_tensors
        length, batch, channels = x.shape
        size = block_length(batch, channels, len(a))
        tables = _Tables(x, min(size, length), len(a))
        flow_table = torch.empty_like(tables.decay)
        dy = torch.zeros_like(x) if dy is None else dy.contiguous()
        flowing = torch.zeros_like(entering[0]) if d_state is None else d_state.clone()
        dx, d_dt = torch.empty_like(x), torch.empty_like(dt)
        da, db, dc = torch.zeros_like(a), torch.empty_like(b), torch.empty_like(c)
        for i in reversed(range(len(entering))):
            span = slice(i * size, (i + 1) * size)
            written = dt[span] * x[span]
            kept = None if keep is None else keep[span]
            decay, states = tables.fill(dt[span], a, written, b[span], kept, entering[i])
            torch.matmul(states[1:], dy[span, ..., None], out=dc[span, ..., None])
            flow = flow_table[: len(decay)]  # the gradient of each state, from its output and all later ones
            torch.mul(c[span, ..., None], dy[span, :, None], out=flow)
            flow[-1] += flowing
            for t in range(len(flow) - 2, -1, -1):
                flow[t].addcmul_(decay[t + 1], flow[t + 1])
            torch.mul(decay[0], flow[0], out=flowing)
            d_written = torch.matmul(b[span, :, None], flow)[:, :, 0]
            torch.matmul(flow, written[..., None], out=db[span, ..., None])
            flow.mul_(states[:-1]).mul_(decay)  # the gradient of dt a
            da += torch.mul(flow, dt[span, :, None], out=decay).sum((0, 1))
            torch.sum(flow.mul_(a), 2, out=d_dt[span])
            d_dt[span].addcmul_(d_written, x[span])
            torch.mul(d_written, dt[span], out=dx[span])
        return dx, d_dt, da, db, dc, flowing if ctx.needs_input_grad[5] else None, None


def scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """All tokens of all rows.

    Args:
        x, dt: [B, L, E]; dt 0 at padding, which then leaves the state alone.
        a: [E, N].
        b, c: [B, L, N].
        state: [B, E, N].
        keep: [B, L]; 0 where a token starts a document, 1 elsewhere. None: all 1.
    """
    if x.shape[1] == 1:
        h = torch.exp(dt[:, 0, :, None] * a) * (state if keep is None else state * keep[:, :1, None])
        h = torch.addcmul(h, (dt[:, 0] * x[:, 0])[..., None], b)
        return torch.matmul(h, c[:, 0, :, None])[:, None, :, 0], h
    first = [value.transpose(0, 1).contiguous() for value in (x, dt, b, c)]
    if keep is not None:
        keep = keep.t().contiguous()[..., None, None]
    y, last = _Diagonal.apply(
        first[0], first[1], a.t().contiguous(), first[2], first[3], state.transpose(1, 2).contiguous(), keep
    )
    return y.transpose(0, 1), last.transpose(1, 2)
