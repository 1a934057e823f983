"""CEMA in blocks of T tokens: matrix products inside a block, a short recurrence between blocks. Cost O(L), any L.

The coefficients do not depend on the input, so a block of T tokens x and the state h that enters it give

    y     = x K + Re(g q^(t+1) . h)        K[s, t] = Re(sum_j g_j p_j q_j^(t-s)) for s <= t: Toeplitz, T x T per channel
    h_out = q^T h + sum_s p q^(T-1-s) x_s

All blocks of all rows are multiplied at once, channel by channel; only `h` runs from block to block. Complex numbers
are laid out as pairs of reals, so that every product is a real matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megalodon.ops.backend import full_precision
from megalodon.ops.layout import Layout, move_rows

BLOCK = 32
"""Tokens in a block. On CPUs 32 balances the products, which grow with T, and the recurrence, which has L/T steps."""


class Tables(NamedTuple):
    """What p, q, gamma and omega become for blocks of T tokens; D channels, N components.

    Time comes first: tables are made by whole rows, and batched products read them as they lie.

    Attributes:
        k: [T, D]; the convolution's first T taps, `omega` in the first.
        read: [T, D, 2N]; what a state that enters the block adds to each token.
        write: [T, D, 2N]; what each token adds to the state that leaves the block.
        decays: complex [m, D, N]; q**T, then the powers asked for.
    """

    k: Tensor
    read: Tensor
    write: Tensor
    decays: Tensor


def powers_of(q: Tensor, n: int) -> Tensor:
    """[n + 1, ...]: q**0 .. q**n by repeated doubling, which is as exact as log2(n) products."""
    powers = q.new_empty(n + 1, *q.shape)
    powers[0] = 1
    known, power = 1, q
    while known <= n:
        more = min(known, n + 1 - known)
        torch.mul(powers[:more], power, out=powers[known : known + more])
        known, power = known + more, power * power
    return powers


def shifts(like: Tensor, size: int) -> Tensor:
    """[T, T * T] of 0 and 1: `k @ shifts` lays taps k out as the T x T Toeplitz matrix K[s, t] = k[t - s]."""
    lag = torch.arange(size, device=like.device)
    places = lag - lag[:, None] == lag[:, None, None]
    return places.to(like.dtype).flatten(1)


def toeplitz(k: Tensor, places: Tensor) -> Tensor:
    """[T, D] -> [D, T, T]: `out[:, s, t] = k[t - s]` for s <= t, else 0; `places` from `shifts`."""
    size, dim = k.shape
    return (k.t() @ places).view(dim, size, size)


def diagonal_sums(kernel: Tensor, places: Tensor) -> Tensor:
    """[D, T, T] -> [T, D]: `out[j] = sum_s kernel[:, s, s + j]`, the adjoint of `toeplitz`."""
    return places @ kernel.flatten(1).t()


def _as_pairs(table: Tensor) -> Tensor:
    return torch.view_as_real(table).flatten(-2)


def _as_complex(pairs: Tensor) -> Tensor:
    return torch.view_as_complex(pairs.contiguous().unflatten(-1, (-1, 2)))


def _sums(table: Tensor, weights: Tensor) -> Tensor:
    """complex [T, D, N] and real [m, T] -> complex [m, D, N]: weighted sums over time."""
    sums = weights @ torch.view_as_real(table).flatten(1)
    return torch.view_as_complex(sums.view(-1, *table.shape[1:], 2))


class _Tables(torch.autograd.Function):
    """The fields of `Tables`, differentiated by hand: autograd's way costs more than the blocks.

    What counts is the number of passes over whole tables. The backward pass makes one product a table, of its gradient
    and the powers one lower, whose plain and weighted sums over time give every gradient: q**t = q q**(t-1), and the
    derivative of q**t is t q**(t-1). With D = sum_t conj(d_t) q**(t-1), a gradient with respect to q is conj(D).
    """

    @staticmethod
    def forward(ctx: Any, p: Tensor, q: Tensor, gamma: Tensor, omega: Tensor | None, size: int, exponents: Tensor):
        powers = powers_of(q, size)
        backwards = powers[:size].index_select(0, torch.arange(size - 1, -1, -1, device=p.device))
        read = torch.mul(powers[1:], gamma).conj_physical_()  # Re(g h) = Re(g) Re(h) - Im(g) Im(h)
        write = backwards * p.to(q.dtype)
        taps = _as_pairs(torch.conj_physical(gamma) * p)[..., None]
        k = torch.bmm(_as_pairs(powers[:size]).transpose(0, 1), taps)[..., 0].t().contiguous()
        if omega is not None:
            k[0] += omega
        ctx.save_for_backward(p, q, gamma, powers, backwards, exponents)
        ctx.with_omega = omega is not None
        return k, _as_pairs(read), _as_pairs(write), powers.index_select(0, exponents)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_k: Tensor, d_read: Tensor, d_write: Tensor, d_decays: Tensor):
        p, q, gamma, powers, backwards, exponents = ctx.saved_tensors
        size = len(backwards)
        times = torch.arange(size + 1, dtype=p.dtype, device=p.device)
        both = torch.stack([torch.ones_like(times), times])

        plain, weighted = _sums(_as_complex(d_read) * powers[:-1], both[:, 1:])
        d_gamma, d_q = q * plain, gamma * weighted  # conjugated, as all below

        d_written = _as_complex(d_write).conj_physical_()
        plain, weighted = _sums(d_written[:-1] * backwards[1:], both[:, 1:size].flip(1))
        d_p = (q * plain + d_written[-1]).real
        d_q += p * weighted

        lags = (d_k.t()[:, None, 1:] * both[:, 1:size]).contiguous()
        sums = torch.bmm(lags, _as_pairs(powers[: size - 1]).transpose(0, 1))
        plain, weighted = torch.view_as_complex(sums.unflatten(-1, (-1, 2))).unbind(1)
        plain = d_k[0, :, None] + q * plain
        d_p += (gamma * plain).real
        d_gamma += p * plain
        d_q += p * gamma * weighted

        factors = powers.index_select(0, (exponents - 1).clamp(min=0)) * exponents[:, None, None]
        d_q += (factors * torch.conj_physical(d_decays)).sum(0)
        return d_p, d_q.conj_physical_(), d_gamma.conj_physical_(), d_k[0] if ctx.with_omega else None, None, None


def tables(
    p: Tensor, q: Tensor, gamma: Tensor, omega: Tensor | None, size: int, exponents: Sequence[int] | Tensor = ()
) -> Tables:
    """The tables of blocks of `size` tokens, and powers of q up to that of `size`."""
    exponents = torch.as_tensor(exponents, dtype=torch.int64, device=p.device)
    return Tables(*_Tables.apply(p, q, gamma, omega, size, F.pad(exponents, (1, 0), value=size)))


class KeptTables:
    """The tables of whole blocks, kept while the coefficients' values stand still, for reading without gradients.

    They take about 4 T D N complex numbers, which is why whoever reads many pieces asks for them.
    """

    def __init__(self) -> None:
        self._coefficients: tuple[Tensor | None, ...] = ()

    def of(self, p: Tensor, q: Tensor, gamma: Tensor, omega: Tensor | None, rest: int) -> tuple[Tables, Tensor]:
        """(`tables` for blocks of `BLOCK` tokens and the power `rest`, if that is not 0; the taps as a `toeplitz`)."""
        given = (p, q, gamma, omega)
        if not self._coefficients or not all(map(_same, given, self._coefficients)):
            self._tables = tables(*given, BLOCK, range(BLOCK + 1))
            self._kernel = toeplitz(self._tables.k, shifts(self._tables.k, BLOCK))
            self._coefficients = tuple(None if x is None else x.clone() for x in given)
        decays = self._tables.decays[[0, rest + 1] if rest else [0]]
        return self._tables._replace(decays=decays), self._kernel


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.device == other.device and one.dtype == other.dtype and torch.equal(one, other)


def _by_block(pairs: Tensor, batch: int) -> Tensor:
    """[D, B n, 2N] -> complex [n, B, D, N]."""
    dim, rows, width = pairs.shape
    return _as_complex(pairs.view(dim, batch, rows // batch, width).permute(2, 1, 0, 3))


def _by_channel(states: Tensor) -> Tensor:
    """complex [n, B, D, N] -> [D, B n, 2N]: the inverse of `_by_block`."""
    pairs = _as_pairs(states)
    return pairs.permute(2, 1, 0, 3).reshape(pairs.shape[2], -1, pairs.shape[3])


def _multiply(
    u: Tensor,
    kernel: Tensor,
    read: Tensor,
    write: Tensor,
    decay: Tensor,
    initial: Tensor | None,
    keep: Tensor | None,
    batch: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The products of the module's head, and the recurrence: (y, the states around the blocks, those that enter)."""
    added = _by_block(torch.bmm(u, write.transpose(0, 1)), batch)
    states = added.new_empty(len(added) + 1, *added.shape[1:])
    states[0] = 0 if initial is None else initial
    for i in range(len(added)):
        if keep is not None:
            states[i] *= keep[i]
        torch.addcmul(added[i], decay, states[i], out=states[i + 1])
    entering = _by_channel(states[:-1])
    return torch.bmm(u, kernel).baddbmm_(entering, read.permute(1, 2, 0)), states, entering


class _Blocks(torch.autograd.Function):
    """All blocks of all rows, `_multiply`, differentiated by hand."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        k: Tensor,
        read: Tensor,
        write: Tensor,
        decay: Tensor,
        initial: Tensor | None,
        keep: Tensor | None,
        batch: int,
    ) -> tuple[Tensor, Tensor]:
        places = shifts(k, len(k))
        kernel = toeplitz(k, places)
        y, states, entering = _multiply(u, kernel, read, write, decay, initial, keep, batch)
        ctx.save_for_backward(u, kernel, read, write, decay, states, entering, keep, places)
        ctx.set_materialize_grads(False)
        return y, states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, d_states: Tensor | None):
        u, kernel, read, write, decay, states, entering, keep, places = ctx.saved_tensors
        dy = torch.zeros_like(u) if dy is None else dy.contiguous()
        flow = states.new_zeros(states.shape) if d_states is None else d_states.clone()
        flow[:-1] += _by_block(torch.bmm(dy, read.transpose(0, 1)), states.shape[1])
        conjugate = torch.conj_physical(decay)
        for i in range(len(flow) - 2, -1, -1):
            flow[i].addcmul_(conjugate, flow[i + 1])
            if keep is not None:
                flow[i] *= keep[i]
        d_decay = (torch.conj_physical(states[:-1]) * flow[1:]).sum(dim=(0, 1))
        d_written = _by_channel(flow[1:])
        d_read = torch.bmm(dy.transpose(1, 2), entering).transpose(0, 1)
        d_write = torch.bmm(u.transpose(1, 2), d_written).transpose(0, 1)
        d_k = diagonal_sums(torch.bmm(u.transpose(1, 2), dy), places)
        du = torch.bmm(dy, kernel.transpose(1, 2)).baddbmm_(d_written, write.permute(1, 2, 0))
        return (
            du,
            d_k,
            d_read,
            d_write,
            d_decay,
            flow[0] if ctx.needs_input_grad[5] else None,
            None,
            None,
        )


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: tuple[int, ...]) -> Tensor:
        ctx.inverse = tuple(dims.index(i) for i in range(len(dims)))
        return x.permute(dims).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        return grad.permute(ctx.inverse).contiguous(), None


def permute(x: Tensor, *dims: int) -> Tensor:
    """`x.permute(dims)`, contiguous in both passes: batched products of strided matrices are many times slower."""
    return _Permute.apply(x, dims)


def step(
    x: Tensor, p: Tensor, q: Tensor, gamma: Tensor, omega: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One token: the recurrence itself."""
    added = p * x[:, 0, :, None]
    if initial_state is None:
        h = torch.complex(added, torch.zeros_like(added))
    else:
        h = q * initial_state
        torch.view_as_real(h)[..., 0].add_(added)
    y = torch.view_as_real(gamma * h)[..., 0].sum(-1)
    if omega is not None:
        y = torch.addcmul(y, omega, x[:, 0])
    return y[:, None], h


def cema(
    x: Tensor,
    p: Tensor,
    q: Tensor,
    gamma: Tensor,
    omega: Tensor | None,
    initial_state: Tensor | None,
    layout: Layout,
    kept: KeptTables | None = None,
) -> tuple[Tensor, Tensor]:
    """See `megalodon.ops.cema`."""
    with torch.autocast(x.device.type, enabled=False):
        u = x.to(full_precision(x.dtype))
        if x.shape[1] == 1 and layout.plain:
            y, last_state = step(u, p, q, gamma, omega, initial_state)
        elif layout.plain:
            y, last_state = _plain(u, p, q, gamma, omega, initial_state, kept)
        else:
            y, last_state = _ragged(u, p, q, gamma, omega, initial_state, layout)
        return y.to(x.dtype), last_state


def _plain(
    x: Tensor,
    p: Tensor,
    q: Tensor,
    gamma: Tensor,
    omega: Tensor | None,
    initial_state: Tensor | None,
    kept: KeptTables | None,
) -> tuple[Tensor, Tensor]:
    batch, length, dim = x.shape
    if length == 0:
        return x, _or_zeros(initial_state, x, q)
    size = min(BLOCK, length)
    count, rest = -(-length // size), length % size
    kernel = None
    if kept is None or size < BLOCK or torch.is_grad_enabled():
        table = tables(p, q, gamma, omega, size, [rest] if rest else [])
    else:
        table, kernel = kept.of(p, q, gamma, omega, rest)
    padded = F.pad(x, (0, 0, 0, size - rest)) if rest else x
    u = permute(padded.reshape(batch * count, size, dim), 2, 0, 1)  # [D, B n, T]
    if kernel is None:
        y, states = _blocks(u, table, batch, initial_state, None)
    else:
        y, states, _ = _multiply(u, kernel, table.read, table.write, table.decays[0], initial_state, None, batch)
        y = permute(y, 1, 2, 0)
    last_state = states[-1]
    if rest:
        tail = u.view(dim, batch, count, size)[:, :, -1, :rest].contiguous()
        last_state = torch.addcmul(_written(tail, table), table.decays[1], states[-2])
    return y.view(batch, count * size, dim)[:, :length], last_state


def _ragged(
    x: Tensor, p: Tensor, q: Tensor, gamma: Tensor, omega: Tensor | None, initial_state: Tensor | None, layout: Layout
) -> tuple[Tensor, Tensor]:
    batch, length, dim = x.shape
    if length == 0:
        return x, _or_zeros(initial_state, x, q)
    size = min(BLOCK, length)
    blocks = layout.blocks(size)
    table = tables(p, q, gamma, omega, size, blocks.tail_length)
    tokens = x.reshape(batch * length, dim)
    aligned = move_rows(tokens, blocks.source, blocks.target, batch * blocks.count * size)
    u = permute(aligned.view(batch * blocks.count, size, dim), 2, 0, 1)
    keep = (~blocks.fresh).t()[:, :, None, None].to(q.dtype)
    y, states = _blocks(u, table, batch, initial_state, keep)
    y = move_rows(y.reshape(-1, dim), blocks.target, blocks.source, batch * length)

    tail = move_rows(tokens, blocks.tail_source, blocks.tail_target, batch * size)
    tail = permute(tail.view(batch, size, dim), 2, 0, 1)
    entering = states[blocks.tail, torch.arange(batch, device=x.device)]
    return y.view(batch, length, dim), torch.addcmul(_written(tail, table), table.decays[1:], entering)


def _blocks(
    u: Tensor, table: Tables, batch: int, initial_state: Tensor | None, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """All blocks: u [D, B n, T] -> (y [B n, T, D], complex [n + 1, B, D, N]: the states around the blocks).

    `keep` [n, B, 1, 1] is 0 where a block starts a document and 1 elsewhere; None: all 1.
    """
    decay = table.decays[0]
    y, states = _Blocks.apply(u, table.k, table.read, table.write, decay, initial_state, keep, batch)
    return permute(y, 1, 2, 0), states


def _written(tail: Tensor, table: Tables) -> Tensor:
    """What the last tokens [D, B, t] of each row, t <= T, leave in its state: complex [B, D, N]."""
    dim, batch, rest = tail.shape
    pairs = torch.bmm(tail, table.write[-rest:].transpose(0, 1))
    return torch.view_as_complex(pairs.view(dim, batch, -1, 2)).transpose(0, 1)


def _or_zeros(initial_state: Tensor | None, x: Tensor, q: Tensor) -> Tensor:
    if initial_state is not None:
        return initial_state
    return torch.zeros(x.shape[0], *q.shape, dtype=q.dtype, device=x.device)
