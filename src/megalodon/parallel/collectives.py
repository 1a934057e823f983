"""Differentiable collectives: each backward pass is the adjoint of its forward pass, sent over the same group.

All ranks of a group call the same ones in the same order, in both passes, because they run the same model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

Group = dist.ProcessGroup

# PyTorch 2.13 renames the two and warns of the old names.
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class Exchange:
    """One all-gather that is begun in one place and ended in another, with other work between, in both passes.

    exchange = Exchange(group)
    begun = exchange.begin(summary)      # [...] of this rank
    ...                                  # work that does not need the others' summaries
    everyone = exchange.end(begun)       # [ranks, ...]
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.work: dist.Work | None = None
        self.reduced: Tensor | None = None
        self.complex = False

    def begin(self, x: Tensor) -> Tensor:
        """Send; the result is not to be read before `end`."""
        self.complex = x.is_complex()
        return _Begin.apply(torch.view_as_real(x) if self.complex else x, self)

    def end(self, begun: Tensor) -> Tensor:
        """Wait for what all ranks sent: [ranks, ...]."""
        everyone = _End.apply(begun, self)
        return torch.view_as_complex(everyone) if self.complex else everyone

    def wait(self) -> None:
        """Wait for the transfer under way."""
        assert self.work is not None
        self.work.wait()
        self.work = None


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        x = x.contiguous()
        out = x.new_empty(dist.get_world_size(exchange.group), *x.shape)
        exchange.work = all_gather(out.flatten(0, 1), x, group=exchange.group, async_op=True)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        exchange = ctx.exchange
        exchange.wait()
        reduced, exchange.reduced = exchange.reduced, None
        assert reduced is not None
        return reduced, None


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, begun: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.wait()
        return begun.view_as(begun)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        exchange = ctx.exchange
        parts = grad.contiguous()
        exchange.reduced = parts.new_empty(parts.shape[1:])
        exchange.work = reduce_scatter(exchange.reduced, parts.flatten(0, 1), group=exchange.group, async_op=True)
        return grad, None


def _gather_last(x: Tensor, group: Group) -> Tensor:
    x = x.contiguous()
    ranks = dist.get_world_size(group)
    out = x.new_empty(ranks, *x.shape)
    all_gather(out.flatten(0, 1), x, group=group)
    return out.movedim(0, -2).flatten(-2)


def _scatter_last(x: Tensor, group: Group) -> Tensor:
    ranks = dist.get_world_size(group)
    parts = x.unflatten(-1, (ranks, -1)).movedim(-2, 0).contiguous()
    out = parts.new_empty(parts.shape[1:])
    reduce_scatter(out, parts.flatten(0, 1), group=group)
    return out


class _GatherLast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _gather_last(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        return _scatter_last(grad, ctx.group), None


class _ScatterLast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _scatter_last(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        return _gather_last(grad, ctx.group), None


def gather_last(x: Tensor, group: Group | None) -> Tensor:
    """The ranks' x side by side in the last dimension; each rank's gradient of the whole is summed back to the parts.

    Under autocast they travel in its dtype: linear layers, which read them, would round them to it anyway.

    Args:
        x: [..., d] on each rank. group: None for one rank.
    """
    if group is None:
        return x
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _GatherLast.apply(x, group)


def scatter_last(x: Tensor, group: Group | None) -> Tensor:
    """The sum of the ranks' x, of which each keeps its part of the last dimension: [..., d] -> [..., d / ranks]."""
    return x if group is None else _ScatterLast.apply(x, group)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
        ctx.sizes, ctx.group = (sent, received), group
        out = x.new_empty(sum(received))
        dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        sent, received = ctx.sizes
        out = grad.new_empty(sum(sent))
        dist.all_to_all_single(out, grad.contiguous(), sent, received, group=ctx.group)
        return out, None, None, None


def all_to_all(x: Tensor, sent: Sequence[int], received: Sequence[int], group: Group) -> Tensor:
    """Send `sent[r]` consecutive elements of a flat x to rank r; the result is what came, in the order of ranks."""
    return _AllToAll.apply(x, list(sent), list(received), group)
