"""TimestepDecayNorm on a GPU: launches of the kernels in `triton_kernels.py`, as operators that autograd and
torch.compile know. Tiles and pieces are TimestepNorm's.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from megalodon.ops.launch import on_device
from megalodon.ops.timestep_decay_norm import triton_kernels as kernels
from megalodon.ops.timestep_decay_norm.statistics import Decay, DecayedStatistics, correction
from megalodon.ops.timestep_norm import triton as shared

WARPS = 4
MASKED_WARPS = 8
"""Of the forward kernel where it reads masks: with fewer it spills a register on sm_80."""


def fits(x: Tensor, initial: DecayedStatistics) -> bool:
    """Whether a group's channels fit a tile; wider groups go through the blocked form."""
    return x.shape[-1] // initial.mean.shape[-1] <= shared.WIDEST


def _cut(x: Tensor, groups: int) -> tuple[int, int]:
    """(pieces of a row, tokens of the longest)."""
    batch, length, dim = x.shape
    longest = shared.piece_length(batch, length, dim, groups)
    return -(-length // longest), longest


@torch.library.custom_op("megalodon::timestep_decay_norm", mutates_args=())
def timestep_decay_norm_op(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    count: Tensor,
    mean: Tensor,
    var: Tensor,
    padding: Tensor | None,
    restart: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x [B, L, D]; count int64 [B]; raw mean and var [B, G], float64; padding, restart bool [B, L].

    Returns y; the mean and scale that each token was normalised by, float32 [B, L, G]; 1/(1 - beta**count) of each
    token, float32 [B, L, 2]; raw (mean, var) after each row, float64 [B, G, 2].
    """
    (batch, length, dim), groups = x.shape, mean.shape[1]
    (pieces, longest), sizes = _cut(x, groups), shared.tile(dim, groups)
    grid = (triton.cdiv(groups, sizes["GC"]) * pieces * batch,)
    y = torch.empty_like(x)
    means = x.new_empty(batch, length, groups, dtype=torch.float32)
    scales = torch.empty_like(means)
    shares = x.new_empty(batch, length, 2, dtype=torch.float32)
    last = mean.new_empty(batch, groups, 2)
    ones1, ones2 = (
        torch.where(count > 0, correction(beta, count, torch.float64), 0)[:, None].expand(batch, groups)
        for beta in (beta1, beta2)
    )
    entering = initial = torch.stack([mean, ones1, var, ones2], -1)
    flags = {"HAS_PADDING": padding is not None, "HAS_RESTART": restart is not None}
    cut = (length, pieces, longest)
    with on_device(x):
        if pieces > 1:
            summary = mean.new_empty(batch * pieces, groups, 6)
            entering = mean.new_empty(batch * pieces, groups, 4)
            kernels.summary_kernel[grid](
                x, padding, restart, summary, *cut, beta1, beta2, groups, dim // groups, **flags, **sizes,
                num_warps=WARPS
            )  # fmt: skip
            kernels.scan_kernel[triton.cdiv(groups, 64), batch](
                initial, summary, entering, pieces, groups, 64, num_warps=2
            )
        kernels.norm_kernel[grid](
            x, weight, bias, padding, restart, entering, y, means, scales, shares, last, eps, *cut, beta1, beta2,
            groups, dim // groups, weight is not None, bias is not None, **flags, **sizes,
            num_warps=MASKED_WARPS if any(flags.values()) else WARPS
        )  # fmt: skip
    return y, means, scales, shares, last


@timestep_decay_norm_op.register_fake
def _(x, weight, bias, count, mean, var, padding, restart, beta1, beta2, eps):
    (batch, length, _), groups = x.shape, mean.shape[1]
    means = x.new_empty(batch, length, groups, dtype=torch.float32)
    shares = x.new_empty(batch, length, 2, dtype=torch.float32)
    return torch.empty_like(x), means, torch.empty_like(means), shares, mean.new_empty(batch, groups, 2)


@torch.library.custom_op("megalodon::timestep_decay_norm_backward", mutates_args=())
def timestep_decay_norm_backward_op(
    dy: Tensor,
    d_last: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    padding: Tensor | None,
    restart: Tensor | None,
    means: Tensor,
    scales: Tensor,
    shares: Tensor,
    beta1: float,
    beta2: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `timestep_decay_norm_op`: x; weight and bias, float32 [2, D]; (mean, var), float64 [B, G, 2]."""
    (batch, length, dim), groups = x.shape, means.shape[-1]
    (pieces, longest), sizes = _cut(x, groups), shared.tile(dim, groups, shared.TILE // 2)
    number = batch * pieces
    grid = (triton.cdiv(groups, sizes["GC"]) * number,)
    summary = x.new_empty(number, groups, 4, dtype=torch.float64)
    flowing = x.new_empty(number, groups, 2, dtype=torch.float64)
    dx, d_affine = torch.empty_like(x), x.new_empty(2, number, dim, dtype=torch.float32)

    def walk(write: bool) -> None:
        kernels.backward_kernel[grid](
            x, dy, weight, padding, restart, means, scales, shares, flowing, dx, summary, d_affine[0], d_affine[1],
            length, pieces, longest, beta1, beta2, groups, dim // groups, write, weight is not None,
            padding is not None, restart is not None, **sizes, num_warps=WARPS
        )  # fmt: skip

    with on_device(x):
        if pieces > 1:
            walk(write=False)
        kernels.adjoint_scan_kernel[triton.cdiv(groups, 64), batch](
            d_last, summary, flowing, pieces, groups, d_last is not None, 64, num_warps=2
        )
        walk(write=True)
    first = summary.view(batch, pieces, groups, 4)[:, 0]
    return dx, d_affine.sum(1), first[..., 1::2].contiguous()


@timestep_decay_norm_backward_op.register_fake
def _(dy, d_last, x, weight, padding, restart, means, scales, shares, beta1, beta2):
    state = x.new_empty(x.shape[0], means.shape[-1], 2, dtype=torch.float64)
    return torch.empty_like(x), x.new_empty(2, x.shape[-1], dtype=torch.float32), state


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, bias, _, _, _, padding, restart, ctx.beta1, ctx.beta2, _ = inputs
    ctx.dtypes = [None if value is None else value.dtype for value in (weight, bias)]
    ctx.mark_non_differentiable(*output[1:4])
    ctx.save_for_backward(x, weight, padding, restart, *output[1:4])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, *others: Tensor | None):
    saved, d_last = ctx.saved_tensors, others[-1]  # once: under gradient checkpointing a second look is an error
    dy = torch.zeros_like(saved[0]) if dy is None else dy.contiguous()
    dx, d_affine, d_initial = torch.ops.megalodon.timestep_decay_norm_backward(
        dy, None if d_last is None else d_last.contiguous(), *saved, ctx.beta1, ctx.beta2
    )
    d_weight, d_bias = (None if t is None else d_affine[i].to(t) for i, t in enumerate(ctx.dtypes))
    return dx, d_weight, d_bias, None, d_initial[..., 0], d_initial[..., 1], *(None,) * 5


timestep_decay_norm_op.register_autograd(_backward, setup_context=_setup_context)


def _count_after(count: Tensor, padding: Tensor | None, restart: Tensor | None, length: int) -> Tensor:
    """The tokens that count after each row, int64 [B]."""
    if padding is None and restart is None:
        return count + length
    index = torch.arange(length, device=count.device)
    real = torch.ones(1, length, dtype=torch.bool, device=count.device) if padding is None else ~padding
    if restart is None:
        return count + real.sum(1)
    latest = torch.where(restart, index, -1).amax(1)
    return torch.where(latest < 0, count, 0) + (real & (index >= latest[:, None])).sum(1)


def timestep_decay_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    initial: DecayedStatistics,
    decay: Decay,
    padding_mask: Tensor | None,
    restart: Tensor | None,
    eps: float,
) -> tuple[Tensor, DecayedStatistics]:
    """See `megalodon.ops.timestep_decay_norm`; x is bfloat16 or float32 with at least one token."""
    weight, bias, padding, restart = (
        None if value is None else value.contiguous() for value in (weight, bias, padding_mask, restart)
    )
    wide = (value.double().contiguous() for value in (initial.mean, initial.var))
    y, *_, last = torch.ops.megalodon.timestep_decay_norm(
        x.contiguous(), weight, bias, initial.count.contiguous(), *wide, padding, restart, decay.mean, decay.var, eps
    )
    state = initial.mean.dtype
    count = _count_after(initial.count, padding, restart, x.shape[1])
    return y, DecayedStatistics(count, last[..., 0].to(state, copy=True), last[..., 1].to(state, copy=True))
