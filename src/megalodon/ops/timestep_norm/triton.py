"""TimestepNorm on a GPU: launches of the kernels in `triton_kernels.py`, as operators that autograd and torch.compile
know.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from megalodon.ops.launch import MAKES_TABLES, on_device
from megalodon.ops.layout import Layout, PlainLayout
from megalodon.ops.pieces import Pieces, pieces_of
from megalodon.ops.timestep_norm import triton_kernels as kernels
from megalodon.ops.timestep_norm.statistics import Prior, Statistics

TILE = 4096
"""Elements that a program reads at once; half as many in the backward pass, which reads two tensors."""

STATISTICS = 256
"""Most statistics (tokens times groups) of a tile: they are float64."""

WARPS = 4
BACKWARD_WARPS = 4

PROGRAMS = 1024
"""Programs that a launch aims at: several for each multiprocessor, since each keeps few bytes in flight."""

SHORTEST = 512
"""Tokens below which a piece is not cut further."""

WIDEST = 4096
"""Most channels of a group."""


def fits(x: Tensor, initial: Statistics) -> bool:
    """Whether a group's channels fit a tile; wider groups go through the blocked form."""
    return x.shape[-1] // initial.mean.shape[-1] <= WIDEST


def tile(dim: int, groups: int, elements: int = TILE) -> dict[str, int]:
    """TT tokens, GC groups and FP (a power of two) channels of a program's tile."""
    features = triton.next_power_of_2(dim // groups)
    together = min(max(64 // features, 1), triton.next_power_of_2(groups))
    tokens = max(min(elements // (together * features), STATISTICS // together), 1)
    return {"TT": tokens, "GC": together, "FP": features}


def piece_length(batch: int, length: int, dim: int, groups: int) -> int:
    """Tokens of a piece: rows are cut only where rows times groups make fewer than half of `PROGRAMS`."""
    programs = batch * triton.cdiv(groups, tile(dim, groups)["GC"])
    wanted = 1 if programs * 2 >= PROGRAMS else triton.cdiv(PROGRAMS, programs)
    return max(triton.cdiv(length, wanted), min(SHORTEST, length))


def _pieces(x: Tensor, groups: int, runs: Tensor | None, rows: Tensor | None, chained: bool) -> Pieces:
    if runs is not None and rows is not None:
        return Pieces(runs, rows, rows, chained, True)
    batch, length, dim = x.shape
    return pieces_of(PlainLayout(batch, length, x.device), piece_length(batch, length, dim, groups), 1)


@torch.library.custom_op("megalodon::timestep_norm", mutates_args=(), **MAKES_TABLES)
def timestep_norm_op(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    count: Tensor,
    mean: Tensor,
    var: Tensor,
    prior_count: int,
    prior_mean: Tensor,
    prior_var: Tensor,
    padding: Tensor | None,
    runs: Tensor | None,
    rows: Tensor | None,
    chained: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x [B, L, D]; count int64 [B]; mean and var [B, G], prior_mean and prior_var [G], float64; padding bool [B, L].

    runs, rows and chained are those of `Pieces`, None for a plain batch. Returns y; the mean and scale that each token
    was normalised by, float32 [B, L, G]; the count after each piece, float64 [n, G]; (count, mean, variance) before
    each piece, float64 [n, G, 3]; the same after each row, float64 [B, G, 3].
    """
    batch, length, dim = x.shape
    groups = mean.shape[1]
    pieces, sizes = _pieces(x, groups, runs, rows, chained), tile(dim, groups)
    number = len(pieces.runs)
    grid = (triton.cdiv(groups, sizes["GC"]) * number,)
    rows_grid = (triton.cdiv(groups, 64), batch)
    ragged = runs is not None
    y = torch.zeros_like(x) if ragged else torch.empty_like(x)
    means = x.new_empty(batch, length, groups, dtype=torch.float32)
    scales = torch.empty_like(means)
    counts = x.new_empty(number, groups, dtype=torch.float64)
    entering = x.new_empty(number, groups, 3, dtype=torch.float64)
    summary = torch.empty_like(entering)
    last = torch.stack([count[:, None].expand_as(mean).to(mean.dtype), mean, var], -1) if ragged else None
    last = mean.new_empty(batch, groups, 3) if last is None else last
    features, given = dim // groups, (weight is not None, bias is not None, padding is not None)
    with on_device(x):
        if pieces.chained:
            kernels.summary_kernel[grid](
                x, padding, pieces.runs, summary, groups, features, given[2], **sizes, num_warps=WARPS
            )
        kernels.scan_kernel[rows_grid](
            pieces.runs, pieces.rows, count, mean, var, prior_count, prior_mean, prior_var, summary, entering, groups,
            64, num_warps=2
        )  # fmt: skip
        kernels.norm_kernel[grid](
            x, weight, bias, padding, pieces.runs, entering, y, means, scales, counts, last, eps, groups,
            features, *given, **sizes, num_warps=WARPS
        )  # fmt: skip
    return y, means, scales, counts, entering, last


@timestep_norm_op.register_fake
def _(x, weight, bias, count, mean, var, prior_count, prior_mean, prior_var, padding, runs, rows, chained, eps):
    batch, length, dim = x.shape
    groups = mean.shape[1]
    number = batch * -(-length // piece_length(batch, length, dim, groups)) if runs is None else len(runs)
    means = x.new_empty(batch, length, groups, dtype=torch.float32)
    entering = mean.new_empty(number, groups, 3)
    return (
        *(torch.empty_like(x), means, torch.empty_like(means)),
        *(mean.new_empty(number, groups), entering, mean.new_empty(batch, groups, 3)),
    )


@torch.library.custom_op("megalodon::timestep_norm_backward", mutates_args=(), **MAKES_TABLES)
def timestep_norm_backward_op(
    dy: Tensor,
    d_last: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    padding: Tensor | None,
    means: Tensor,
    scales: Tensor,
    counts: Tensor,
    entering: Tensor,
    last: Tensor,
    prior_count: int,
    runs: Tensor | None,
    rows: Tensor | None,
    chained: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `timestep_norm_op`: x; weight and bias, float32 [2, D]; mean, var float64 [B, G]; priors [2, G]."""
    batch, _, dim = x.shape
    groups = means.shape[-1]
    pieces, sizes = _pieces(x, groups, runs, rows, chained), tile(dim, groups, TILE // 2)
    number, features = len(pieces.runs), dim // groups
    grid = (triton.cdiv(groups, sizes["GC"]) * number,)
    flowing, summary = last.new_empty(number, groups, 2), torch.empty_like(entering)
    dx = torch.zeros_like(x) if runs is not None else torch.empty_like(x)
    d_affine = x.new_empty(2, number, dim, dtype=torch.float32)
    d_mean = d_var = None
    if d_last is not None:
        d_mean, d_var = d_last[..., 1].contiguous(), d_last[..., 2].contiguous()

    def walk(write: bool) -> None:
        kernels.backward_kernel[grid](
            x, dy, weight, padding, pieces.runs, means, scales, counts, flowing, dx, summary, d_affine[0], d_affine[1],
            groups, features, write, weight is not None, padding is not None, **sizes, num_warps=BACKWARD_WARPS
        )  # fmt: skip

    with on_device(x):
        if pieces.chained:
            walk(write=False)
        kernels.adjoint_scan_kernel[triton.cdiv(groups, 64), batch](
            pieces.runs, pieces.rows, last, d_mean, d_var, summary, flowing, groups, d_last is not None, 64, num_warps=2
        )
        walk(write=True)
    d_mean, d_var, d_prior = _to_initial(pieces, entering, last, summary, d_mean, d_var, prior_count)
    return dx, d_affine.sum(1), d_mean, d_var, d_prior


def _to_initial(
    pieces: Pieces,
    entering: Tensor,
    last: Tensor,
    summary: Tensor,
    d_mean: Tensor | None,
    d_var: Tensor | None,
    prior_count: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """From the sums before each piece: gradients of the statistics before each row [B, G], and of the priors [2, G]."""
    first, several = pieces.rows[:, 0].long(), pieces.rows[:, 1] > 0
    first = first.clamp(max=len(summary) - 1)
    weight = entering[first][..., 0] * several[:, None]
    before = [weight * summary[first][..., i] for i in (1, 0)]
    if d_mean is not None and d_var is not None:  # a row that has seen nothing hands its statistics on
        nothing = last[..., 0] == 0
        untouched = nothing | ~several[:, None]
        before = [torch.where(untouched, d, b) for d, b in zip((d_mean, d_var), before, strict=True)]
    fresh = (pieces.runs[:, 2:3] != 0) * float(prior_count)
    d_prior = torch.stack([(fresh * summary[..., i]).sum(0) for i in (1, 0)])
    return before[0], before[1], d_prior


@timestep_norm_backward_op.register_fake
def _(dy, d_last, x, weight, padding, means, scales, counts, entering, last, prior_count, runs, rows, chained):
    dim, (batch, groups) = x.shape[-1], last.shape[:2]
    state = last.new_empty(batch, groups)
    d_affine = x.new_empty(2, dim, dtype=torch.float32)
    return torch.empty_like(x), d_affine, state, torch.empty_like(state), last.new_empty(2, groups)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, bias, _, _, _, ctx.prior_count, _, _, padding, runs, rows, ctx.chained, _ = inputs
    ctx.dtypes = [None if value is None else value.dtype for value in (weight, bias)]
    ctx.mark_non_differentiable(*output[1:5])
    ctx.save_for_backward(x, weight, padding, *output[1:], runs, rows)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, *others: Tensor | None):
    *tensors, runs, rows = ctx.saved_tensors
    x, d_last = tensors[0], others[-1]
    dy = torch.zeros_like(x) if dy is None else dy.contiguous()
    dx, d_affine, d_mean, d_var, d_prior = torch.ops.megalodon.timestep_norm_backward(
        dy, d_last, *tensors, ctx.prior_count, runs, rows, ctx.chained
    )
    d_weight, d_bias = (None if t is None else d_affine[i].to(t) for i, t in enumerate(ctx.dtypes))
    return dx, d_weight, d_bias, None, d_mean, d_var, None, d_prior[0], d_prior[1], *(None,) * 5


timestep_norm_op.register_autograd(_backward, setup_context=_setup_context)


def timestep_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    initial: Statistics,
    prior: Prior | None,
    padding_mask: Tensor | None,
    *,
    layout: Layout,
    eps: float,
) -> tuple[Tensor, Statistics]:
    """See `megalodon.ops.timestep_norm`; x is bfloat16 or float32 with at least one token."""
    wide = (value.double().contiguous() for value in (initial.mean, initial.var))
    if prior is None:  # no document starts afresh: never read
        prior = Prior(0, initial.mean[0].detach(), initial.var[0].detach())
    priors = (value.double().contiguous() for value in (prior.mean, prior.var))
    runs = rows = None
    chained = False
    if not layout.plain:
        longest = piece_length(layout.batch, layout.length, x.shape[-1], initial.mean.shape[-1])
        pieces = pieces_of(layout, longest, 1)
        runs, rows, chained = pieces.runs, pieces.rows, pieces.chained
    padding = None if padding_mask is None else padding_mask.contiguous()
    affine = (None if value is None else value.contiguous() for value in (weight, bias))
    y, *_, last = torch.ops.megalodon.timestep_norm(
        x.contiguous(),
        *affine,
        initial.count.contiguous(),
        *wide,
        prior.count,
        *priors,
        padding,
        runs,
        rows,
        chained,
        eps,
    )
    state = initial.mean.dtype
    count = last[:, 0, 0].detach().long()
    return y, Statistics(count, last[..., 1].to(state, copy=True), last[..., 2].to(state, copy=True))
