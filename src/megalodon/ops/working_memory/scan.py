"""The memory's own arithmetic: chunks absorbed in order, and reading. All is batched but one short loop over chunks.

With A the addresses and W the shares of a chunk's tokens, `M' = M + rho (U - G M - M)`, G = W^T A [d, d] and
U = W^T v [d, e]: G and U of all chunks are batched products, and the loop has one [d, d] by [d, e] product a step.
Nothing as large as the tokens is kept for the backward pass but the tokens themselves; A, W, G and U are made anew.

Chunks of several sequences are absorbed side by side, step by step: step s holds those of the first `steps[s]`
sequences, which fall from step to step, so that sequences of any lengths need no padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def heads_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., C, H, d] -> [T, H, C, d], the leading dimensions as one."""
    return x.flatten(0, -4).transpose(1, 2).to(dtype, memory_format=torch.contiguous_format)


def _alive(k: Tensor, live: Tensor | None) -> Tensor:
    return k if live is None else k.masked_fill(~live[:, None, :, None], -torch.inf)


class _LogMass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor, live: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(k, live)
        ctx.dtype = dtype
        return _alive(heads_first(k, dtype), live).logsumexp(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        k, live = ctx.saved_tensors
        share = _alive(heads_first(k, ctx.dtype), live).softmax(2)
        return _tokens_first(share.mul_(grad[:, :, None]), k), None, None


def log_masses(k: Tensor, live: Tensor | None, dtype: torch.dtype) -> Tensor:
    """logsumexp of each feature over a chunk's tokens: k [..., C, H, d], live bool [T, C] -> [T, H, d]."""
    return _LogMass.apply(k, live, dtype)


def _tokens_first(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of `heads_first`, in the shape and dtype of `like`."""
    return x.transpose(1, 2).to(like.dtype).reshape(like.shape)


def running_log_mass(own: Tensor, before: Tensor, keep: Tensor | None, steps: Sequence[int]) -> Tensor:
    """The log mass after each chunk: own [T, H, d] by steps, before [K, H, d], keep bool [T] -> [T, H, d]."""
    totals, total = [], before
    for at in _slices(steps):
        total = total[: at.stop - at.start]
        if keep is not None:
            total = total.masked_fill(~keep[at, None, None], -torch.inf)
        total = torch.logaddexp(total, own[at])
        totals.append(total)
    return torch.cat(totals)


def _slices(steps: Sequence[int]) -> Iterator[slice]:
    start = 0
    for count in steps:
        yield slice(start, start + count)
        start += count


def _products(k: Tensor, v: Tensor, live: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(A, W, G, U) of the module's head for k [T, H, C, d], v [T, H, C, e]."""
    address, share = k.softmax(-1), _alive(k, live).softmax(2)
    return address, share, torch.matmul(share.mT, address), torch.matmul(share.mT, v)


class _Absorb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        k: Tensor,
        v: Tensor,
        rate: Tensor,
        memory: Tensor,
        live: Tensor | None,
        keep: Tensor | None,
        steps: Sequence[int],
    ) -> Tensor:
        *_, g, u = _products(heads_first(k, memory.dtype), heads_first(v, memory.dtype), live)
        current, rates = memory, rate[..., None]
        for at in _slices(steps):
            current = _kept(current, at, keep)
            target = u[at].sub_(torch.matmul(g[at], current)).sub_(current)  # memories take the place of U
            current = torch.addcmul(current, rates[at], target, out=target)
        ctx.save_for_backward(k, v, rate, memory, live, keep, u)
        ctx.steps = steps
        return u

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        k, v, rate, memory, live, keep, memories = ctx.saved_tensors
        keys, values = heads_first(k, memory.dtype), heads_first(v, memory.dtype)
        address, share, g, u = _products(keys, values, live)
        slices, rates = list(_slices(ctx.steps)), rate[..., None]
        flow = torch.zeros_like(memory)  # the gradient of the memory after the step
        d_rate, d_g = torch.empty_like(rate), torch.empty_like(g)
        for s in range(len(slices) - 1, -1, -1):
            at = slices[s]
            before = _kept(memories[slices[s - 1]] if s else memory, at, keep)
            now = flow[: at.stop - at.start]
            now += grad[at]
            target = u[at].sub_(torch.matmul(g[at], before)).sub_(before)
            d_rate[at] = target.mul_(now).sum(-1)
            d_u = torch.mul(rates[at], now, out=target)  # takes the place of U
            d_g[at] = torch.matmul(d_u, before.mT).neg_()
            now.sub_(torch.matmul(g[at].mT, d_u)).sub_(d_u)
            if keep is not None:
                now *= keep[at, None, None, None]
        d_share = torch.matmul(address, d_g.mT).add_(torch.matmul(values, u.mT))
        d_k = torch._softmax_backward_data(torch.matmul(share, d_g), address, -1, address.dtype)
        d_k += torch._softmax_backward_data(d_share, share, 2, share.dtype)
        d_v = _tokens_first(torch.matmul(share, u), v)
        return _tokens_first(d_k, k), d_v, d_rate, flow, None, None, None


def _kept(memory: Tensor, at: slice, keep: Tensor | None) -> Tensor:
    """The memories that go into a step, [n, H, d, e]: zero where it begins a segment."""
    current = memory[: at.stop - at.start]
    return current if keep is None else current * keep[at, None, None, None]


def absorb(
    k: Tensor,
    v: Tensor,
    memory: Tensor,
    log_mass: Tensor,
    steps: Sequence[int],
    live: Tensor | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The memory after each chunk.

    Args:
        k: [..., C, H, d]; v: [..., C, H, e]; T chunks, step after step, those of a step sequence by sequence.
        memory: [K, H, d, e]; log_mass: [K, H, d]; what the sequences hold before.
        steps: how many chunks each step has: at most K, and never more than the step before.
        live: bool [T, C]; the tokens that count. None: all.
        keep: bool [T]; False where the memory is forgotten before the chunk. None: nowhere.

    Returns:
        (memories [T, H, d, e], log masses [T, H, d]) after each chunk.
    """
    own = log_masses(k, live, log_mass.dtype)
    masses = running_log_mass(own, log_mass, keep, steps)
    return _Absorb.apply(k, v, torch.exp(own - masses).to(memory.dtype), memory, live, keep, steps), masses


class Reading(NamedTuple):
    """Tokens that read one memory: `tokens` of the batch, number `place` of the memories of group `run`."""

    tokens: slice
    run: int
    place: int


class _Read(torch.autograd.Function):
    """Memories are given group by group, [n, B, H, d, e] each."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, dtype: torch.dtype, readings: list[Reading], *memories: Tensor) -> Tensor:
        ctx.save_for_backward(q, *memories)
        ctx.readings = readings
        out = q.new_empty(*q.shape[:3], memories[0].shape[-1], dtype=dtype)
        done = 0
        for tokens, run, place in readings:
            out[:, done : tokens.start] = 0
            _product(_address(q, tokens, memories[run]), memories[run][place], out[:, tokens])
            done = tokens.stop
        out[:, done:] = 0
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        q, *memories = ctx.saved_tensors
        dq, d_memories = torch.zeros_like(q), [torch.zeros_like(memory) for memory in memories]
        for tokens, run, place in ctx.readings:
            memory = memories[run][place]
            address, found = _address(q, tokens, memories[run]), grad[:, tokens].transpose(1, 2).to(memory.dtype)
            torch.matmul(address.mT, found, out=d_memories[run][place])
            d_address = torch.matmul(found, memory.mT)
            d_scores = torch._softmax_backward_data(d_address, address, -1, address.dtype)
            dq[:, tokens] = d_scores.transpose(1, 2).to(q.dtype)
        return dq, None, None, *d_memories


def _address(q: Tensor, tokens: slice, memory: Tensor) -> Tensor:
    """[B, H, l, d]: how much of each of a memory's rows tokens read."""
    return heads_first(q[:, tokens], memory.dtype).softmax(-1)


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`out = (a @ b).transpose(1, 2)`; written where it belongs if there is one row and head."""
    if len(a) == a.shape[1] == 1 and out.dtype == a.dtype:
        torch.mm(a[0, 0], b[0, 0], out=out[0, :, 0])
    else:
        out.copy_(torch.matmul(a, b).transpose(1, 2))


def read_all(q: Tensor, dtype: torch.dtype, readings: list[Reading], memories: list[Tensor]) -> Tensor:
    """What tokens find in the memories of their chunks.

    Args:
        q: [B, L, H, d].
        dtype: of the result.
        readings: in order, each token in one at most, each memory in one at most.
        memories: [n, B, H, d, e] each.

    Returns:
        [B, L, H, e]; zero for tokens that read nothing.
    """
    return _Read.apply(q, dtype, readings, *memories)


def read(q: Tensor, memory: Tensor) -> Tensor:
    """What tokens find: q [T, l, H, d] and the memory of each group, [T, H, d, e] -> [T, l, H, e]."""
    return read_all(q, memory.dtype, [Reading(slice(0, q.shape[1]), 0, 0)], [memory[None]])
