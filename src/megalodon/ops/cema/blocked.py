"""CEMA in blocks of T tokens: matrix products inside a block, a short recurrence between blocks. Cost O(L), any L.

The coefficients do not depend on the input, so a block of T tokens x and the state h that enters it give

    y     = x K + Re(g q^(t+1) . h)        K[s, t] = Re(sum_j g_j p_j q_j^(t-s)) for s <= t: Toeplitz, T x T per channel
    h_out = q^T h + sum_s p q^(T-1-s) x_s

All blocks of all rows are multiplied at once, channel by channel; only `h` runs from block to block. Complex numbers
are laid out as pairs of reals, so that every product is a real matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from megalodon.ops.backend import full_precision
from megalodon.ops.layout import Layout, move_rows

BLOCK = 32
"""Tokens in a block. On CPUs 32 balances the products, which grow with T, and the recurrence, which has L/T steps."""


@dataclass(frozen=True)
class Coefficients:
    """What p, q, gamma and omega become for blocks of T tokens; D channels, N components.

    Attributes:
        kernel: [D, T, T]; K above, `omega` on its diagonal.
        read: [D, 2N, T]; what a state that enters the block adds to each token.
        write: [D, T, 2N]; what each token adds to the state that leaves the block.
        powers: complex [T + 1, D, N]; powers of q.
    """

    kernel: Tensor
    read: Tensor
    write: Tensor
    powers: Tensor


def powers_of(q: Tensor, n: int) -> Tensor:
    """[n + 1, ...]: q**0 .. q**n by repeated doubling, which is as exact as log2(n) products."""
    powers = torch.stack([torch.ones_like(q), q])
    while len(powers) <= n:
        powers = torch.cat([powers, powers[1 : n + 2 - len(powers)] * powers[-1]])
    return powers[: n + 1]


def toeplitz(k: Tensor) -> Tensor:
    """[D, T] -> [D, T, T]: `out[:, s, t] = k[:, t - s]` for s <= t, else 0: rows of 2T read 2T - 1 apart."""
    dim, size = k.shape
    rows = F.pad(k, (0, size))[:, None].expand(dim, size, 2 * size).reshape(dim, -1)
    return rows[:, : size * (2 * size - 1)].view(dim, size, 2 * size - 1)[:, :, :size].contiguous()


def diagonal_sums(kernel: Tensor) -> Tensor:
    """[D, T, T] -> [D, T]: `out[:, j] = sum_s kernel[:, s, s + j]`, the adjoint of `toeplitz`."""
    dim, size, _ = kernel.shape
    rows = kernel.new_zeros(dim, size * 2 * size)
    rows[:, : size * (2 * size - 1)].view(dim, size, 2 * size - 1)[:, :, :size] = kernel
    return rows.view(dim, size, 2 * size)[:, :, :size].sum(1)


class _Coefficients(torch.autograd.Function):
    """(kernel, read, write, powers), differentiated by hand: autograd's way costs as much as the blocks."""

    @staticmethod
    def forward(ctx: FunctionCtx, p: Tensor, q: Tensor, gamma: Tensor, omega: Tensor | None, size: int):
        dim, components = q.shape
        powers = powers_of(q, size)
        seen = gamma * powers  # [T + 1, D, N]
        k = torch.einsum("tdn,dn->dt", seen.real[:size], p)
        if omega is not None:
            k[:, 0] += omega
        read = torch.view_as_real(seen[1:].conj().resolve_conj())  # Re(g h) = Re(g) Re(h) - Im(g) Im(h)
        write = torch.view_as_real(powers[:size].flip(0) * p)
        ctx.save_for_backward(p, gamma, powers, seen)
        ctx.with_omega = omega is not None
        return (
            toeplitz(k),
            read.permute(1, 2, 3, 0).reshape(dim, 2 * components, size),
            write.permute(1, 0, 2, 3).reshape(dim, size, 2 * components),
            powers,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_kernel: Tensor, d_read: Tensor, d_write: Tensor, d_powers: Tensor):
        p, gamma, powers, seen = ctx.saved_tensors
        size, (dim, components) = len(powers) - 1, p.shape
        d_k = diagonal_sums(d_kernel).t()[..., None]  # [T, D, 1]
        d_seen = torch.zeros_like(seen)
        d_seen[1:] = torch.view_as_complex(
            d_read.view(dim, components, 2, size).permute(3, 0, 1, 2).contiguous()
        ).conj()
        d_seen[:size] += d_k * p
        d_written = torch.view_as_complex(d_write.view(dim, size, components, 2)).transpose(0, 1).flip(0)
        d_p = (d_k * seen.real[:size]).sum(0) + (powers[:size].conj() * d_written).real.sum(0)
        d_powers = d_powers + gamma.conj() * d_seen
        d_powers[:size] += p * d_written
        d_gamma = (powers.conj() * d_seen).sum(0)
        exponents = torch.arange(1, size + 1, dtype=p.dtype, device=p.device)[:, None, None]
        d_q = (powers[:size].conj() * (exponents * d_powers[1:])).sum(0)
        return d_p, d_q, d_gamma, d_k[0, :, 0] if ctx.with_omega else None, None


def coefficients(p: Tensor, q: Tensor, gamma: Tensor, omega: Tensor | None, size: int) -> Coefficients:
    """The matrices of blocks of `size` tokens."""
    return Coefficients(*_Coefficients.apply(p, q, gamma, omega, size))


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, dims: tuple[int, ...]) -> Tensor:
        ctx.inverse = tuple(dims.index(i) for i in range(len(dims)))
        return x.permute(dims).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor):
        return grad.permute(ctx.inverse).contiguous(), None


def permute(x: Tensor, *dims: int) -> Tensor:
    """`x.permute(dims)`, contiguous in both passes: batched products of strided matrices are many times slower."""
    return _Permute.apply(x, dims)


class _Scan(torch.autograd.Function):
    """States that enter each of n blocks: `h[k + 1] = keep[k + 1] (decay h[k] + added[k])`."""

    @staticmethod
    def forward(ctx: FunctionCtx, added: Tensor, decay: Tensor, initial: Tensor, keep: Tensor | None) -> Tensor:
        states = torch.empty_like(added)
        states[0] = initial
        for k in range(len(added) - 1):
            torch.addcmul(added[k], decay, states[k], out=states[k + 1])
            if keep is not None:
                states[k + 1] *= keep[k + 1]
        ctx.save_for_backward(states, decay, keep)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor):
        states, decay, keep = ctx.saved_tensors
        conjugate = decay.conj().resolve_conj()
        d_added = torch.empty_like(states)
        d_added[-1] = 0
        flowing = grad[-1]
        for k in range(len(states) - 2, -1, -1):
            d_added[k] = flowing if keep is None else flowing * keep[k + 1]
            flowing = torch.addcmul(grad[k], conjugate, d_added[k])
        d_decay = (states.conj() * d_added).sum(dim=(0, 1))
        return d_added, d_decay, flowing if keep is None else flowing * keep[0], None


def scan(added: Tensor, decay: Tensor, initial: Tensor, keep: Tensor | None = None) -> Tensor:
    """The state that enters each block.

    Args:
        added: complex [n, B, D, N]; what each block adds to the state.
        decay: complex [D, N]; what is left of a state after one block.
        initial: complex [B, D, N]; the state before the first block.
        keep: [n, B, 1, 1] of 0 and 1; 0 where a block starts a document. None: all 1.

    Returns:
        complex [n, B, D, N].
    """
    if keep is not None:
        initial = initial * keep[0]
    return _Scan.apply(added, decay, initial, keep)


def step(
    x: Tensor, p: Tensor, q: Tensor, gamma: Tensor, omega: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One token: the recurrence itself."""
    h = p * x[:, 0, :, None] + 0j
    if initial_state is not None:
        h = h + q * initial_state
    y = (gamma * h).real.sum(-1)
    if omega is not None:
        y = torch.addcmul(y, omega, x[:, 0])
    return y[:, None], h


def cema(
    x: Tensor, p: Tensor, q: Tensor, gamma: Tensor, omega: Tensor | None, initial_state: Tensor | None, layout: Layout
) -> tuple[Tensor, Tensor]:
    """See `megalodon.ops.cema`."""
    with torch.autocast(x.device.type, enabled=False):
        u = x.to(full_precision(x.dtype))
        if x.shape[1] == 1 and layout.plain:
            y, last_state = step(u, p, q, gamma, omega, initial_state)
        elif layout.plain:
            y, last_state = _plain(u, p, q, gamma, omega, initial_state)
        else:
            y, last_state = _ragged(u, p, q, gamma, omega, initial_state, layout)
        return y.to(x.dtype), last_state


def _plain(
    x: Tensor, p: Tensor, q: Tensor, gamma: Tensor, omega: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, length, dim = x.shape
    if length == 0:
        return x, _or_zeros(initial_state, x, q)
    size = min(BLOCK, length)
    count = -(-length // size)
    c = coefficients(p, q, gamma, omega, size)
    padded = F.pad(x, (0, 0, 0, count * size - length)) if length % size else x
    u = permute(padded.reshape(batch * count, size, dim), 2, 0, 1)  # [D, B n, T]
    y, states = _blocks(u, c, batch, initial_state, None)
    rest = length - (count - 1) * size
    tail = u.view(dim, batch, count, size)[:, :, -1, :rest]
    write = c.write if rest == size else c.write[:, size - rest :]
    written = torch.view_as_complex((tail @ write).view(dim, batch, -1, 2)).transpose(0, 1)
    last_state = torch.addcmul(written, c.powers[rest], states[-1])
    return y.view(batch, count * size, dim)[:, :length], last_state


def _ragged(
    x: Tensor, p: Tensor, q: Tensor, gamma: Tensor, omega: Tensor | None, initial_state: Tensor | None, layout: Layout
) -> tuple[Tensor, Tensor]:
    batch, length, dim = x.shape
    if length == 0:
        return x, _or_zeros(initial_state, x, q)
    size = min(BLOCK, length)
    blocks = layout.blocks(size)
    c = coefficients(p, q, gamma, omega, size)
    tokens = x.reshape(batch * length, dim)
    aligned = move_rows(tokens, blocks.source, blocks.target, batch * blocks.count * size)
    u = permute(aligned.view(batch * blocks.count, size, dim), 2, 0, 1)
    keep = (~blocks.fresh).t()[:, :, None, None].to(p.dtype)
    y, states = _blocks(u, c, batch, initial_state, keep)
    y = move_rows(y.reshape(-1, dim), blocks.target, blocks.source, batch * length)

    tail = move_rows(tokens, blocks.tail_source, blocks.tail_target, batch * size)
    tail = permute(tail.view(batch, size, dim), 2, 0, 1)
    written = torch.view_as_complex((tail @ c.write).view(dim, batch, -1, 2)).transpose(0, 1)
    entering = states[blocks.tail, torch.arange(batch, device=x.device)]
    return y.view(batch, length, dim), written + c.powers[blocks.tail_length] * entering


def _blocks(
    u: Tensor, c: Coefficients, batch: int, initial_state: Tensor | None, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """All blocks: u [D, B n, T] -> (y [B n, T, D], the states [n, B, D, N] that enter the blocks)."""
    dim, rows, size = u.shape
    count, components = rows // batch, c.powers.shape[-1]
    if count > 1:
        written = (u @ c.write).view(dim, batch, count, components, 2)
        added = torch.view_as_complex(permute(written, 2, 1, 0, 3, 4))
    else:
        added = c.powers.new_zeros(1, batch, dim, components)
    states = scan(added, c.powers[size], _or_zeros(initial_state, u.view(batch, -1, dim), c.powers[0]), keep)
    y = torch.bmm(u, c.kernel)
    if count > 1 or initial_state is not None:
        entering = permute(torch.view_as_real(states), 2, 1, 0, 3, 4).view(dim, rows, 2 * components)
        y = torch.baddbmm(y, entering, c.read)
    return permute(y, 1, 2, 0), states


def _or_zeros(initial_state: Tensor | None, x: Tensor, q: Tensor) -> Tensor:
    if initial_state is not None:
        return initial_state
    return torch.zeros(x.shape[0], *q.shape, dtype=q.dtype, device=x.device)
