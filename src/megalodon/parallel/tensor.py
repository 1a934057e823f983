"""Tensor parallelism: every parameter is cut, none is copied, and the residual stream is cut along its channels.

Between layers each rank has D / T channels of every token. TimestepNorm's groups and CEMA's channels are its own, so
both memories need no exchange. RMSNorm and LayerNorm exchange two numbers a token. A projection reads whole vectors,
gathered from the ranks, and gives its own heads or hidden units; one that ends a branch gives sums that are scattered
back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import functional as F

from megalodon.models.layers.norms import LayerNorm, RMSNorm
from megalodon.parallel.collectives import Exchange, Group, scatter_last

SECOND_DIMENSION = ("attention.o_proj.weight", "feed_forward.down_proj.weight", "qk_weight", "qk_bias")
"""Parameters, by the end of their names, that are cut along their second dimension; all others along their first."""


def sharded_dimension(name: str) -> int:
    """Along which dimension the tensor axis cuts a parameter, by its dotted name."""
    return 1 if name.endswith(SECOND_DIMENSION) else 0


class LocalLinear(nn.Linear):
    """A linear layer that computes with this rank's part of its parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, local(self.weight), None if self.bias is None else local(self.bias))


def local(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


@contextmanager
def local_parameters(*modules: nn.Module) -> Iterator[None]:
    """A context in which the modules' own parameters are this rank's parts, as plain tensors."""
    saved = [(module, dict(module._parameters)) for module in modules]
    try:
        for module, parameters in saved:
            for name, parameter in parameters.items():
                if parameter is not None:
                    module._parameters[name] = local(parameter)  # type: ignore[assignment]
        yield
    finally:
        for module, parameters in saved:
            module._parameters.update(parameters)


def distribute_parameters(root: nn.Module, mesh: DeviceMesh) -> None:
    """Cut every parameter along the tensor axis, in place. All ranks hold the same whole values before."""
    done: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    for prefix, module in root.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in done:
                dimension = sharded_dimension(f"{prefix}.{name}")
                cut = distribute_tensor(parameter.data, mesh, [Shard(dimension)], src_data_rank=None)
                done[id(parameter)] = nn.Parameter(cut, requires_grad=parameter.requires_grad)
            setattr(module, name, done[id(parameter)])
        if type(module) is nn.Linear:
            module.__class__ = LocalLinear


def rms_norm(norm: RMSNorm, x: Tensor, group: Group) -> Tensor:
    """`RMSNorm.forward` of vectors cut over the ranks: [..., D / T] -> [..., D / T]."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean_square = _mean_over_ranks(wide.square().mean(-1, keepdim=True), group)
    y = wide * torch.rsqrt(mean_square + norm.eps)
    return (y if norm.weight is None else y * (norm.weight.to(y.dtype) + 1)).to(x.dtype)


def layer_norm(norm: LayerNorm, x: Tensor, group: Group) -> Tensor:
    """`LayerNorm.forward` of vectors cut over the ranks: [..., D / T] -> [..., D / T]."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    own = wide.mean(-1, keepdim=True)
    spread = (wide - own).square().mean(-1, keepdim=True)
    exchange = Exchange(group)
    means, spreads = exchange.end(exchange.begin(torch.cat([own, spread], dim=-1))).split(1, dim=-1)
    mean = means.mean(0)
    var = (spreads + (means - mean).square()).mean(0)
    y = (wide - mean) * torch.rsqrt(var + norm.eps)
    if norm.weight is not None:
        assert norm.bias is not None
        y = torch.addcmul(norm.bias.to(y.dtype), y, norm.weight.to(y.dtype) + 1)
    return y.to(x.dtype)


def _mean_over_ranks(x: Tensor, group: Group) -> Tensor:
    exchange = Exchange(group)
    return exchange.end(exchange.begin(x)).mean(0)


def embed(weight: Tensor, ids: Tensor, group: Group) -> Tensor:
    """Vectors of token ids from a table cut by vocabulary, cut by channels: int64 [B, L] -> [B, L, D / T]."""
    first = dist.get_rank(group) * len(weight)
    places = ids - first
    own = (places >= 0) & (places < len(weight))
    x = F.embedding(places.where(own, 0), weight) * own[..., None]
    return scatter_last(x, group)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, group: Group) -> Tensor:
        first = dist.get_rank(group) * logits.shape[-1]
        largest = logits.amax(-1)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group)
        shifted = logits - largest[:, None]
        places = targets - first
        own = (places >= 0) & (places < logits.shape[-1])
        picked = shifted.gather(1, places.where(own, 0)[:, None])[:, 0] * own
        sums = torch.stack([shifted.exp().sum(-1), picked])
        dist.all_reduce(sums, group=group)
        real = targets != -100
        ctx.save_for_backward(shifted, sums[0], places, own, real)
        return ((sums[0].log() - sums[1]) * real).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        shifted, total, places, own, real = ctx.saved_tensors
        d_logits = shifted.exp() / total[:, None]
        d_logits[torch.arange(len(own), device=own.device), places.where(own, 0)] -= own.to(d_logits.dtype)
        return d_logits * (grad * real)[:, None], None, None


def cross_entropy(logits: Tensor, targets: Tensor, group: Group) -> Tensor:
    """The summed loss over a vocabulary cut over the ranks; no rank sees another's logits.

    Args:
        logits: float32 [n, V / T]. targets: int64 [n]; -100 is ignored.
    """
    return _CrossEntropy.apply(logits, targets, group)
