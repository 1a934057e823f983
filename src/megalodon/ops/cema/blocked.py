"""CEMA in blocks of T tokens: matrix products inside a block, a short recurrence between blocks. Cost O(L), any L.

The coefficients do not depend on the input, so a block of T tokens x and the state h that enters it give

    y     = x K + Re(g q^(t+1) . h)        K[s, t] = Re(sum_j g_j p_j q_j^(t-s)) for s <= t: Toeplitz, T x T per channel
    h_out = q^T h + sum_s p q^(T-1-s) x_s

All blocks of all rows are multiplied at once, channel by channel; only `h` runs from block to block. Complex numbers
are laid out as pairs of reals, so that every product is a real matrix product. One table holds all that grows with T:
the powers of q, [D, T, 2N].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megalodon.ops.backend import full_precision
from megalodon.ops.layout import Layout
from megalodon.ops.tiles import move_rows

BLOCK = 32
"""Tokens in a block. On CPUs 32 balances the products, which grow with T, and the recurrence, which has L/T steps."""


def _as_pairs(values: Tensor) -> Tensor:
    return torch.view_as_real(values).flatten(-2)


def _as_complex(pairs: Tensor) -> Tensor:
    return torch.view_as_complex(pairs.unflatten(-1, (-1, 2)))


class _Powers(torch.autograd.Function):
    """q complex [D, N] -> [D, n, 2N]: pairs of q**1 .. q**n."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, n: int) -> Tensor:
        powers = q.new_empty(n, *q.shape)  # time comes first here: doubling then multiplies whole rows
        powers[0] = q
        known = 1
        while known < n:
            more = min(known, n - known)
            torch.mul(powers[:more], powers[known - 1], out=powers[known : known + more])
            known += more
        pairs = _as_pairs(powers).transpose(0, 1).contiguous()
        ctx.save_for_backward(pairs)
        return pairs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        """`sum_t conj(t q**(t-1)) grad_t`."""
        (pairs,) = ctx.saved_tensors
        grad = grad.clone(memory_format=torch.contiguous_format)  # of one power, it may have any strides
        products = torch.conj_physical(_as_complex(grad[:, 1:])).mul_(_as_complex(pairs[:, :-1]))
        weights = torch.arange(2, pairs.shape[1] + 1, dtype=pairs.dtype, device=pairs.device)
        sums = weights.expand(len(pairs), 1, -1) @ _as_pairs(products)
        return _as_complex(sums[:, 0]).conj_physical_().add_(_as_complex(grad[:, 0])), None


def powers(q: Tensor, n: int) -> Tensor:
    """complex [D, N] -> real [D, n, 2N]: q**1 .. q**n as pairs, as exact as log2(n) products, differentiable."""
    return _Powers.apply(q, n)


def _ones(powers: Tensor) -> Tensor:
    """[D, 1, 2N]: pairs of q**0."""
    return powers.new_tensor([1, 0]).repeat(len(powers), 1, powers.shape[-1] // 2)


def _lags(size: int, like: Tensor) -> Tensor:
    """[T, T + 1] of 0 and 1: 1 where row s of a Toeplitz matrix has the lag j, s + j < T.

    Such rows, T + 1 long, laid end to end are the rows of the matrix, T long: each begins one place later.
    """
    lag = torch.arange(size + 1, device=like.device)
    return (lag[:-1, None] + lag < size).to(like.dtype)


def toeplitz(k: Tensor) -> Tensor:
    """[D, T] -> [D, T, T]: `out[:, s, t] = k[:, t - s]` for s <= t, else 0."""
    dim, size = k.shape
    rows = F.pad(k, (0, 1))[:, None] * _lags(size, k)
    return rows.flatten(1)[:, : size * size].view(dim, size, size)


def diagonal_sums_(kernel: Tensor) -> Tensor:
    """[D, T, T] -> [D, T]: `out[:, j] = sum_s kernel[:, s, s + j]`, the adjoint of `toeplitz`; overwrites `kernel`."""
    size = kernel.shape[1]
    last = kernel[:, -1, -1].clone()  # the only lag of the last row, whose others would lie beyond the end
    rows = kernel.flatten(1)[:, : size * size - 1].unflatten(1, (size - 1, size + 1))
    sums = rows.mul_(_lags(size, kernel)[:-1]).sum(1)[:, :size]
    sums[:, 0] += last
    return sums


def _by_block(pairs: Tensor, batch: int) -> Tensor:
    """[D, B n, 2N] -> complex [n, B, D, N]."""
    dim, rows, width = pairs.shape
    return _as_complex(pairs.view(dim, batch, rows // batch, width).permute(2, 1, 0, 3).contiguous())


def _by_channel(states: Tensor) -> Tensor:
    """complex [n, B, D, N] -> [D, B n, 2N]: the inverse of `_by_block`."""
    pairs = _as_pairs(states)
    return pairs.permute(2, 1, 0, 3).reshape(pairs.shape[2], -1, pairs.shape[3])


def _mirrored(p: Tensor) -> Tensor:
    """real [D, N] -> [D, 1, 2N]: (p, -p) for each pair, which multiplies the conjugate of what it meets by p."""
    return torch.stack([p, -p], dim=-1).flatten(1)[:, None]


class Coefficients(NamedTuple):
    """p real, q and gamma complex [D, N]; omega real [D] or None: see `megalodon.ops.cema`."""

    p: Tensor
    q: Tensor
    gamma: Tensor
    omega: Tensor | None


class Tables(NamedTuple):
    """What p, q, gamma and omega become for blocks of T tokens.

    Attributes:
        powers: [D, T, 2N]; pairs of q**1 .. q**T.
        write: [D, T, 2N]; what each token of a block adds to the conjugate of the state after it.
        decay, gamma, taps: complex [D, N]; the conjugates of q**T, gamma and gamma p.
        kernel: [D, T, T]; the first T taps of the convolution, as a Toeplitz matrix.
    """

    powers: Tensor
    write: Tensor
    decay: Tensor
    gamma: Tensor
    taps: Tensor
    kernel: Tensor


def tables(powers: Tensor, p: Tensor, gamma: Tensor, omega: Tensor | None) -> Tables:
    """The tables, from the powers of q."""
    lower = powers[:, :-1]
    write = torch.empty_like(powers)  # q**(T-1) .. q**0, conjugate, by p
    torch.mul(lower.flip(1), _mirrored(p), out=write[:, :-1])
    write[:, -1:] = _ones(powers) * _mirrored(p)
    gamma = torch.conj_physical(gamma)
    taps = gamma * p
    k = F.pad(torch.bmm(lower, _as_pairs(taps)[..., None])[..., 0], (1, 0))
    k[:, 0] = taps.real.sum(-1) if omega is None else taps.real.sum(-1) + omega
    return Tables(powers, write, _as_complex(powers[:, -1]).conj_physical(), gamma, taps, toeplitz(k))


class KeptTables:
    """The tables of whole blocks, kept while the coefficients' values stand still, for reading without gradients.

    They take three tables of powers, T D 2N numbers each: so whoever reads many pieces asks for them.
    """

    def __init__(self) -> None:
        self._kept: tuple[tuple[Tensor | None, ...], Tables] | None = None  # one attribute: threads see both or none

    def of(self, given: Coefficients) -> Tables:
        """`tables` for blocks of `BLOCK` tokens."""
        kept = self._kept
        if kept is None or not all(map(_same, given, kept[0])):
            made = tables(powers(given.q, BLOCK), given.p, given.gamma, given.omega)
            kept = self._kept = tuple(None if x is None else x.clone() for x in given), made
        return kept[1]


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.device == other.device and one.dtype == other.dtype and torch.equal(one, other)


def _multiply(
    u: Tensor, table: Tables, initial: Tensor | None, keep: Tensor | None, batch: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The products of the module's head, and the recurrence, for u [D, B n, T] and keep [n, B, 1, 1].

    Re(z q) is the dot product of the pairs of conj(z) and q: so the conjugates of states are carried.

    Returns:
        (y like u, the conjugates of the states around the blocks: complex [n + 1, B, D, N], what enters: [D, B n, 2N]).
    """
    added = _by_block(torch.bmm(u, table.write), batch)
    states = added.new_empty(len(added) + 1, *added.shape[1:])
    states[0] = 0 if initial is None else initial
    for i in range(len(added)):
        if keep is not None:
            states[i] *= keep[i]
        torch.addcmul(added[i], table.decay, states[i], out=states[i + 1])
    entering = _by_channel(table.gamma * states[:-1])
    y = torch.bmm(u, table.kernel).baddbmm_(entering, table.powers.transpose(1, 2))
    return y, states, entering


class _Blocks(torch.autograd.Function):
    """All blocks of all rows, `_multiply`, differentiated by hand."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        powers: Tensor,
        p: Tensor,
        gamma: Tensor,
        omega: Tensor | None,
        initial: Tensor | None,
        keep: Tensor | None,
        batch: int,
    ) -> tuple[Tensor, Tensor]:
        table = tables(powers, p, gamma, omega)
        y, states, entering = _multiply(u, table, initial, keep, batch)
        _, write, decay, gamma, taps, kernel = table
        ctx.save_for_backward(u, powers, p, gamma, states, entering, taps, kernel, write, decay, keep)
        ctx.set_materialize_grads(False)
        return y, states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, d_states: Tensor | None):
        u, powers, p, gamma, states, entering, taps, kernel, write, decay, keep = ctx.saved_tensors
        dy = torch.zeros_like(u) if dy is None else dy.contiguous()
        d_entering = _by_block(torch.bmm(dy, powers), states.shape[1])
        if d_states is None:
            flow = torch.empty_like(states)
            torch.mul(torch.conj_physical(gamma), d_entering, out=flow[:-1])
            flow[-1] = 0
        else:
            flow = d_states.clone()
            flow[:-1].addcmul_(torch.conj_physical(gamma), d_entering)
        conjugate = torch.conj_physical(decay)
        for i in range(len(flow) - 2, -1, -1):
            flow[i].addcmul_(conjugate, flow[i + 1])
            if keep is not None:
                flow[i] *= keep[i]
        d_written = _by_channel(flow[1:])
        du = torch.bmm(dy, kernel.transpose(1, 2)).baddbmm_(d_written, write.transpose(1, 2))

        entered = torch.conj_physical(states[:-1])
        d_gamma = d_entering.mul_(entered).sum((0, 1))
        d_decay = entered.mul_(flow[1:]).sum((0, 1))

        d_k = diagonal_sums_(torch.bmm(u.transpose(1, 2), dy))
        d_taps = _as_complex(torch.bmm(d_k[:, None, 1:], powers[:, :-1])[:, 0])
        d_taps.real += d_k[:, :1]
        d_gamma = torch.conj_physical(d_gamma.addcmul_(d_taps, p))

        d_write = torch.bmm(u.transpose(1, 2), d_written).flip(1).mul_(_mirrored(torch.ones_like(p)))
        d_p = (d_write[:, 1:] * powers[:, :-1]).sum(1).add_(d_write[:, 0] * _ones(powers)[:, 0])
        d_p = d_p.unflatten(-1, (-1, 2)).sum(-1).add_((torch.conj_physical(gamma) * d_taps).real)

        d_powers = torch.bmm(dy.transpose(1, 2), entering)
        d_powers[:, :-1].addcmul_(d_write[:, 1:], p.repeat_interleave(2, dim=1)[:, None])
        d_powers[:, :-1].addcmul_(d_k[:, 1:, None], _as_pairs(taps)[:, None])
        d_powers[:, -1] += _as_pairs(d_decay.conj_physical_())
        d_omega = d_k[:, 0] if ctx.needs_input_grad[4] else None
        return du, d_powers, d_p, d_gamma, d_omega, flow[0] if ctx.needs_input_grad[5] else None, None, None


class _Transpose(torch.autograd.Function):
    """[m, n] -> [n, m], contiguous in both passes: batched products of strided matrices are many times slower."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.t().contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        return grad.t().contiguous()


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
        if x.shape[1] == 0:
            return x, _or_zeros(initial_state, x, q)
        coefficients = Coefficients(p, q, gamma, omega)
        if x.shape[1] == 1 and layout.plain:
            y, last_state = step(u, *coefficients, initial_state)
        elif layout.plain:
            y, last_state = _plain(u, coefficients, initial_state, kept)
        else:
            y, last_state = _ragged(u, coefficients, initial_state, layout)
        return y.to(x.dtype), last_state


def _plain(
    x: Tensor, coefficients: Coefficients, initial_state: Tensor | None, kept: KeptTables | None
) -> tuple[Tensor, Tensor]:
    batch, length, dim = x.shape
    size = min(BLOCK, length)
    rest = length % size
    padded = F.pad(x, (0, 0, 0, size - rest)) if rest else x
    u = _Transpose.apply(padded.reshape(-1, dim)).view(dim, -1, size)  # [D, B n, T]
    if kept is None or size < BLOCK or torch.is_grad_enabled():
        table = powers(coefficients.q, size)
        y, states = _blocks(u, table, coefficients, batch, initial_state, None)
    else:
        found = kept.of(coefficients)
        table = found.powers
        y, states, _ = _multiply(u, found, None if initial_state is None else _conjugate(initial_state), None, batch)
        y = _Transpose.apply(y.flatten(1))
    if rest:
        tail = u.view(dim, batch, -1, size)[:, :, -1, :rest].contiguous()
        last_state = _after(tail, table, coefficients.p) + _as_complex(table[:, rest - 1]) * states[-2].conj()
    else:
        last_state = _conjugate(states[-1])
    return y.view(batch, -1, dim)[:, :length], last_state


def _ragged(
    x: Tensor, coefficients: Coefficients, initial_state: Tensor | None, layout: Layout
) -> tuple[Tensor, Tensor]:
    batch, length, dim = x.shape
    size = min(BLOCK, length)
    blocks = layout.blocks(size)
    table = powers(coefficients.q, size)
    tokens = x.reshape(batch * length, dim)
    aligned = move_rows(tokens, blocks.source, blocks.target, batch * blocks.count * size)
    u = _Transpose.apply(aligned).view(dim, -1, size)
    keep = (~blocks.fresh).t()[:, :, None, None].to(coefficients.q.dtype)
    y, states = _blocks(u, table, coefficients, batch, initial_state, keep)
    y = move_rows(y, blocks.target, blocks.source, batch * length)

    tail = move_rows(tokens, blocks.tail_source, blocks.tail_target, batch * size)
    tail = _Transpose.apply(tail).view(dim, batch, size)
    entering = states[blocks.tail, torch.arange(batch, device=x.device)].conj()
    decays = torch.cat([_ones(table), table], dim=1).index_select(1, blocks.tail_length)
    decays = _as_complex(decays.transpose(0, 1).contiguous())  # [B, D, N]
    return y.view(batch, length, dim), _after(tail, table, coefficients.p) + decays * entering


def _blocks(
    u: Tensor,
    table: Tensor,
    coefficients: Coefficients,
    batch: int,
    initial_state: Tensor | None,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """All blocks: u [D, B n, T] -> (y [B n T, D], conjugate states around the blocks: complex [n + 1, B, D, N]).

    `keep` [n, B, 1, 1] is 0 where a block starts a document and 1 elsewhere; None: all 1.
    """
    p, _, gamma, omega = coefficients
    initial = None if initial_state is None else _conjugate(initial_state)
    y, states = _Blocks.apply(u, table, p, gamma, omega, initial, keep, batch)
    return _Transpose.apply(y.flatten(1)), states


def _conjugate(state: Tensor) -> Tensor:
    return torch.conj_physical(state)


def _after(tail: Tensor, powers: Tensor, p: Tensor) -> Tensor:
    """What the last tokens [D, B, t] of each row, t <= T, leave in its state: complex [B, D, N]."""
    lower = torch.cat([_ones(powers), powers[:, : tail.shape[-1] - 1]], dim=1)
    pairs = torch.bmm(tail, lower.flip(1) * p.repeat_interleave(2, dim=1)[:, None])
    return _as_complex(pairs).transpose(0, 1)


def _or_zeros(initial_state: Tensor | None, x: Tensor, q: Tensor) -> Tensor:
    if initial_state is not None:
        return initial_state
    return torch.zeros(x.shape[0], *q.shape, dtype=q.dtype, device=x.device)
