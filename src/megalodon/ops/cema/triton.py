"""CEMA on a GPU: launches of the kernels in `triton_kernels.py`, as operators that autograd and torch.compile know."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from megalodon.ops.cema import triton_kernels as kernels
from megalodon.ops.launch import MAKES_TABLES, on_device
from megalodon.ops.layout import Layout, PlainLayout
from megalodon.ops.pieces import GROUP, Pieces, pieces_of

BLOCK = 16
"""T, tokens in a block: the depth of one bfloat16 tensor-core product."""

WARPS = 8

PROGRAMS = 512
"""Programs that a launch aims at: a few for each multiprocessor of today's GPUs."""

SHORTEST = 256
"""Tokens below which a piece is not cut further: the coefficients of a program must pay for themselves."""

CORRELATE_TILE = {"DC": 8, "NP": 8}
"""Channels and components of a program of `correlate_kernel`, one channel a warp: its ten states fill the registers."""


def channels(components: int, itemsize: int) -> int:
    """Channels of one program: 32 bytes of a token, unless more than 16 components fill the registers."""
    return max(32 // itemsize * 16 // padded(components), 4)


def padded(components: int) -> int:
    """Components in a tile; the tensor cores take no fewer than 16."""
    return max(triton.next_power_of_2(components), 16)


def piece_length(batch: int, length: int, dim: int, components: int, itemsize: int) -> int:
    """Tokens of a piece: short enough that all pieces together make `PROGRAMS` programs."""
    groups = -(-PROGRAMS * channels(components, itemsize) // dim)
    wanted = -(-batch * length // (groups * GROUP))
    return min(max(-(-wanted // 64) * 64, SHORTEST), -(-length // BLOCK) * BLOCK)


def _pieces(x: Tensor, components: int, runs: Tensor | None, rows: Tensor | None, order: Tensor | None) -> Pieces:
    if runs is not None and rows is not None and order is not None:
        return Pieces(runs, rows, order, True, True)
    batch, length, dim = x.shape
    return pieces_of(
        PlainLayout(batch, length, x.device), piece_length(batch, length, dim, components, x.itemsize), BLOCK
    )


def _launch_sizes(x: Tensor, components: int, order: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    size = channels(components, x.itemsize)
    sizes = {"DC": size, "M": GROUP, "T": BLOCK, "NP": padded(components), "BITS": (BLOCK - 1).bit_length()}
    sizes |= {"num_warps": WARPS, "num_stages": 2}
    return (triton.cdiv(x.shape[-1], size), len(order) // GROUP), sizes


@torch.library.custom_op("megalodon::cema", mutates_args=(), **MAKES_TABLES)
def cema_op(
    x: Tensor,
    p: Tensor,
    q: Tensor,
    gamma: Tensor,
    omega: Tensor | None,
    initial: Tensor | None,
    runs: Tensor | None,
    rows: Tensor | None,
    order: Tensor | None,
    padded_rows: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, L, D] bfloat16 or float32; p [D, N]; q and gamma [D, N, 2]; initial [B, D, N, 2] -> (y, last like it,
    the states [n, D, N, 2] that enter the n pieces).

    runs, rows and order are the tables of `Pieces`, none of them for a plain batch; `padded_rows` says whether some
    tokens are in no piece. All contiguous; all but x float32.
    """
    batch, _, dim = x.shape
    components = p.shape[1]
    pieces = _pieces(x, components, runs, rows, order)
    grid, sizes = _launch_sizes(x, components, pieces.order)
    taps = x.new_empty(dim, BLOCK, dtype=torch.float32)
    local = x.new_empty(len(pieces.runs), dim, components, 2, dtype=torch.float32)
    entering, last = torch.empty_like(local), x.new_empty(batch, dim, components, 2, dtype=torch.float32)
    y = torch.zeros_like(x) if padded_rows else torch.empty_like(x)
    with on_device(x):
        _taps(p, q, gamma, omega, taps, sizes)
        kernels.states_kernel[grid](x, pieces.runs, pieces.order, p, q, local, dim, components, False, **sizes)
        flat = dim * components
        kernels.scan_kernel[triton.cdiv(flat, 256), batch](
            pieces.runs, pieces.rows, q, local, initial, entering, last, flat, initial is not None, _bits(x), 256
        )
        kernels.outputs_kernel[grid](
            x, pieces.runs, pieces.order, taps, p, q, gamma, entering, y, dim, components, False, **sizes
        )  # fmt: skip
    return y, last, entering


def _taps(p: Tensor, q: Tensor, gamma: Tensor, omega: Tensor | None, taps: Tensor, sizes: dict[str, int]) -> None:
    dim, components = p.shape
    kernels.taps_kernel[(triton.cdiv(dim, 4),)](
        p, q, gamma, omega, taps, dim, components, omega is not None, 4, BLOCK, sizes["NP"], sizes["BITS"]
    )


def _bits(x: Tensor) -> int:
    """Bits of a piece's length, in steps of 4 so that few kernels are compiled."""
    return -(-x.shape[1].bit_length() // 4) * 4


@cema_op.register_fake
def _(x, p, q, gamma, omega, initial, runs, rows, order, padded_rows):
    batch, length, dim = x.shape
    if runs is None:
        longest = piece_length(batch, length, dim, p.shape[1], x.itemsize)
        count = batch * (
            length // BLOCK * BLOCK // longest + (length // BLOCK * BLOCK % longest > 0) + (length % BLOCK > 0)
        )
    else:
        count = len(runs)
    state = x.new_empty(batch, *q.shape, dtype=torch.float32)
    return torch.empty_like(x), state, state.new_empty(count, *q.shape)


@torch.library.custom_op("megalodon::cema_backward", mutates_args=(), **MAKES_TABLES)
def cema_backward_op(
    dy: Tensor,
    d_last: Tensor | None,
    x: Tensor,
    p: Tensor,
    q: Tensor,
    gamma: Tensor,
    omega: Tensor | None,
    entering: Tensor,
    runs: Tensor | None,
    rows: Tensor | None,
    order: Tensor | None,
    padded_rows: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `cema_op` with respect to x, p, q, gamma, omega (as [D], given or not) and the initial state."""
    batch, _, dim = x.shape
    components = p.shape[1]
    pieces = _pieces(x, components, runs, rows, order)
    grid, sizes = _launch_sizes(x, components, pieces.order)
    groups, parts = grid[1], triton.cdiv(components, CORRELATE_TILE["NP"])

    def scratch(*shape: int) -> Tensor:
        return x.new_empty(*shape, dtype=torch.float32)

    taps, local, leaving = scratch(dim, BLOCK), torch.empty_like(entering), torch.empty_like(entering)
    sums, correlation = scratch(groups, dim, components, 2, 2), scratch(groups, dim, BLOCK, BLOCK)
    ends = scratch(len(entering), dim, components, 2, 2)
    partial, d_initial = scratch(batch, dim, components, 5), scratch(batch, dim, components, 2)
    d_p, d_q, d_gamma, d_omega = scratch(*p.shape), scratch(*q.shape), scratch(*q.shape), scratch(dim)
    dx = torch.zeros_like(x) if padded_rows else torch.empty_like(x)
    with on_device(x):
        _taps(p, q, gamma, omega, taps, sizes)
        kernels.states_kernel[grid](dy, pieces.runs, pieces.order, p, q, local, dim, components, True, **sizes)
        kernels.correlate_kernel[triton.cdiv(dim, CORRELATE_TILE["DC"]) * parts, groups](
            x, dy, pieces.runs, pieces.order, p, q, entering, ends, correlation, sums, dim, components,
            **{**sizes, **CORRELATE_TILE, "num_warps": CORRELATE_TILE["DC"]}
        )  # fmt: skip
        kernels.adjoint_scan_kernel[triton.cdiv(dim * components, 256), batch](
            x, pieces.runs, pieces.rows, p, q, gamma, entering, ends, local, d_last, leaving, d_initial, partial,
            dim, components, d_last is not None, _bits(x), BLOCK, 256
        )  # fmt: skip
        kernels.outputs_kernel[grid](
            dy, pieces.runs, pieces.order, taps, p, q, gamma, leaving, dx, dim, components, True, **sizes
        )  # fmt: skip
        kernels.gradients_kernel[(dim,)](
            p, q, gamma, correlation, sums, partial, d_p, d_q, d_gamma, d_omega, dim, components, groups, batch,
            BLOCK, sizes["NP"], num_warps=1
        )  # fmt: skip
    return dx, d_p, d_q, d_gamma, d_omega, d_initial


@cema_backward_op.register_fake
def _(dy, d_last, x, p, q, gamma, omega, entering, runs, rows, order, padded_rows):
    state = x.new_empty(x.shape[0], *q.shape, dtype=torch.float32)
    like = (torch.empty_like(value) for value in (x, p, q, gamma))
    return *like, p.new_empty(p.shape[0]), state


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, p, q, gamma, omega, initial, runs, rows, order, ctx.padded_rows = inputs
    ctx.with_initial = initial is not None
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(x, p, q, gamma, omega, output[2], runs, rows, order)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, d_last: Tensor | None, _: Tensor | None):
    x, p, q, gamma, omega, entering, runs, rows, order = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy.contiguous()
    d_last = None if d_last is None else d_last.contiguous()
    dx, d_p, d_q, d_gamma, d_omega, d_initial = torch.ops.megalodon.cema_backward(
        dy, d_last, x, p, q, gamma, omega, entering, runs, rows, order, ctx.padded_rows
    )
    d_omega, d_initial = d_omega if omega is not None else None, d_initial if ctx.with_initial else None
    return dx, d_p, d_q, d_gamma, d_omega, d_initial, None, None, None, None


cema_op.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("megalodon::cema_step", mutates_args=())
def cema_step_op(
    x: Tensor, p: Tensor, q: Tensor, gamma: Tensor, omega: Tensor | None, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`cema_op` of one token a row, in one launch and without gradients: x [B, 1, D]."""
    batch, _, dim = x.shape
    components = p.shape[1]
    y, last = torch.empty_like(x), x.new_empty(batch, dim, components, 2, dtype=torch.float32)
    with on_device(x):
        kernels.step_kernel[triton.cdiv(dim, 32), batch](
            x, p, q, gamma, omega, initial, y, last, dim, components, omega is not None, initial is not None, 32,
            triton.next_power_of_2(components)
        )  # fmt: skip
    return y, last


@cema_step_op.register_fake
def _(x, p, q, gamma, omega, initial):
    return torch.empty_like(x), x.new_empty(x.shape[0], *q.shape, dtype=torch.float32)


def _parts(value: Tensor) -> Tensor:
    """complex [...] -> [..., 2], re and im."""
    return torch.view_as_real(value.resolve_conj()).contiguous()


def cema(
    x: Tensor,
    p: Tensor,
    q: Tensor,
    gamma: Tensor,
    omega: Tensor | None,
    initial_state: Tensor | None,
    layout: Layout,
) -> tuple[Tensor, Tensor]:
    """See `megalodon.ops.cema`; x is bfloat16 or float32 with at least one token."""
    initial = None if initial_state is None else _parts(initial_state)
    omega = None if omega is None else omega.contiguous()
    coefficients = (p.contiguous(), _parts(q), _parts(gamma))
    arguments = (x.contiguous(), *coefficients, omega, initial)
    differentiable = torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in arguments)
    if layout.plain and x.shape[1] == 1 and not differentiable:
        y, last = torch.ops.megalodon.cema_step(*arguments)
        return y, torch.view_as_complex(last)
    if layout.plain:
        y, last, _ = torch.ops.megalodon.cema(*arguments, None, None, None, False)
    else:
        longest = piece_length(layout.batch, layout.length, x.shape[-1], p.shape[1], x.itemsize)
        pieces = pieces_of(layout, longest, BLOCK)
        y, last, _ = torch.ops.megalodon.cema(*arguments, pieces.runs, pieces.rows, pieces.order, pieces.padding)
    return y, torch.view_as_complex(last)
