"""The recurrence between blocks: one state enters each, in a loop over memory that is written once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Carry(torch.autograd.Function):
    """`S_{i+1} = through_i S_i + added_i`, `through` [n, N, f or 1, 1], elementwise, or [n, N, f, f], a matrix."""

    @staticmethod
    def forward(ctx: Any, through: Tensor, added: Tensor, state: Tensor, matrices: bool) -> Tensor:
        states = added.new_empty(len(added) + 1, *state.shape)
        states[0] = state
        for i in range(len(added)):
            if matrices:
                torch.baddbmm(added[i], through[i], states[i], out=states[i + 1])
            else:
                torch.addcmul(added[i], through[i], states[i], out=states[i + 1])
        ctx.save_for_backward(through, states)
        ctx.matrices = matrices
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        through, states = ctx.saved_tensors
        total = torch.empty_like(states)
        total[-1] = grad[-1]
        for i in reversed(range(len(through))):
            if ctx.matrices:
                torch.baddbmm(grad[i], through[i].transpose(1, 2), total[i + 1], out=total[i])
            else:
                torch.addcmul(grad[i], through[i], total[i + 1], out=total[i])
        if ctx.matrices:
            d_through = total[1:] @ states[:-1].transpose(-1, -2)
        else:
            d_through = (total[1:] * states[:-1]).sum(-1, keepdim=True)
            if through.shape[-2] == 1:
                d_through = d_through.sum(-2, keepdim=True)
        return d_through, total[1:], total[0], None


def carry(through: Tensor | None, added: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """`S_{i+1} = through_i S_i + added_i` over blocks.

    Args:
        through: [B or 1, G, n or 1, f or 1, 1]; None: 1.
        added: [B, G, n, f, e].
        state: [B, G, f, e]; what enters the first block.

    Returns:
        (what enters each block [B, G, n, f, e], what the last one leaves [B, G, f, e]).
    """
    if added.shape[2] == 1:
        return state[:, :, None], added[:, :, 0] + (state if through is None else through[:, :, 0] * state)
    if through is None:
        states = torch.cat([state[:, :, None], added], 2).cumsum(2)
        return states[:, :, :-1], states[:, :, -1]
    return _run(through.expand(*added.shape[:3], -1, -1), added, state, False)


def carry_by_matrices(through: Tensor, added: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """`carry` with `through` [B, G, n, f, f], each a matrix that the state is multiplied by."""
    return _run(through, added, state, True)


def _run(through: Tensor, added: Tensor, state: Tensor, matrices: bool) -> tuple[Tensor, Tensor]:
    by_block = [x.movedim(2, 0).flatten(1, 2).contiguous() for x in (through, added)]
    states = _Carry.apply(by_block[0], by_block[1], state.flatten(0, 1), matrices)
    states = states.unflatten(1, state.shape[:2]).movedim(0, 2)
    return states[:, :, :-1], states[:, :, -1]
