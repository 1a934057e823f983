"""TimestepNorm on a CPU, token by token and compiled: see `ops.compiled.norms`.

For float32 (and bfloat16, widened); statistics run in float64. Kept for the backward pass: x, and for each group and
token a mean and a scale.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalodon.ops import compiled
from megalodon.ops.compiled.tables import Norm
from megalodon.ops.timestep_norm.blocked import cumulative
from megalodon.ops.timestep_norm.statistics import Prior, Statistics


def fits(x: Tensor) -> bool:
    """Whether the kernels take x [B, L, D], and can be had; single tokens are as quick without."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
        return False
    if not x.numel() or x.shape[1] == 1 or torch.compiler.is_compiling():
        return False
    return all(compiled.kernel(f"norms.{way}") is not None for way in ("forward", "backward"))


def _call(name: str, shape: torch.Size, groups: int, eps: float, **tensors: Tensor) -> None:
    kernel = compiled.kernel(name)
    assert kernel is not None, "`fits` has asked for it"
    table, wide_eps = np.zeros(len(Norm), np.int64), np.array([eps])
    table[[Norm.rows, Norm.length, Norm.dim, Norm.groups, Norm.eps]] = *shape, groups, wide_eps.ctypes.data
    for field, tensor in tensors.items():
        table[getattr(Norm, field)] = tensor.data_ptr()
    kernel(table, shape.numel())


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, prior_mean: Tensor,
        prior_var: Tensor, places: dict[str, Tensor], eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        groups = mean.shape[1]
        y, last, last_var = torch.empty_like(x), mean.clone(), var.clone()
        means, scales = x.new_empty(*x.shape[:2], groups, dtype=torch.float64), x.new_empty(*x.shape[:2], groups)
        tensors = {"x": x, "weight": weight, "prior_mean": prior_mean, "means": means, "scales": scales, **places}
        _call(
            "norms.forward",
            x.shape,
            groups,
            eps,
            y=y,
            bias=bias,
            mean=last,
            var=last_var,
            prior_var=prior_var,
            **tensors,
        )
        ctx.save_for_backward(x, weight, prior_mean, means, scales, mean)
        ctx.places, ctx.eps = places, eps
        return y, last, last_var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, d_mean: Tensor | None, d_var: Tensor | None):
        x, weight, prior_mean, means, scales, initial = ctx.saved_tensors
        batch, _, dim = x.shape
        dx, dy = torch.empty_like(x), torch.zeros_like(x) if dy is None else dy.contiguous()
        to_mean, to_var = (
            torch.zeros_like(initial) if value is None else value.clone(memory_format=torch.contiguous_format)
            for value in (d_mean, d_var)
        )
        d_prior_mean, d_prior_var = torch.zeros_like(initial), torch.zeros_like(initial)
        d_weight, d_bias = x.new_zeros(batch, dim), x.new_zeros(batch, dim)
        tensors = {"x": x, "weight": weight, "prior_mean": prior_mean, "means": means, "scales": scales, **ctx.places}
        _call(
            "norms.backward", x.shape, initial.shape[1], ctx.eps, y=dx, dy=dy, mean=to_mean, var=to_var,
            initial=initial, d_weight=d_weight, d_bias=d_bias, d_prior_mean=d_prior_mean, d_prior_var=d_prior_var,
            **tensors,
        )  # fmt: skip
        priors = (d_prior_mean.sum(0), d_prior_var.sum(0))
        return dx, d_weight.sum(0), d_bias.sum(0), to_mean, to_var, *priors, None, None


def timestep_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    initial: Statistics,
    prior: Prior | None,
    padding_mask: Tensor | None,
    document_start: Tensor | None,
    eps: float,
) -> tuple[Tensor, Statistics]:
    """See `megalodon.ops.timestep_norm`; for what `fits`."""
    batch, length, dim = x.shape
    groups, wide = initial.mean.shape[1], torch.float64
    index = torch.arange(length)
    fresh = torch.zeros(batch, length, dtype=torch.bool) if document_start is None else document_start == index
    fresh[:, 0] = False
    real = torch.ones(batch, length, dtype=torch.bool) if padding_mask is None else ~padding_mask
    first = initial.count[:, None].expand(batch, length)
    if document_start is not None:
        assert prior is not None
        first = torch.where(document_start == 0, first, prior.count)
    count = first + cumulative(real.long()[..., None], document_start)[..., 0]
    places = {"before": count - real.long(), "fresh": fresh.to(torch.uint8), "real": real.to(torch.uint8)}
    none = Prior.default(groups, wide, x.device) if prior is None else prior
    y, mean, var = _Norm.apply(
        x.float().contiguous(),
        torch.ones(dim) if weight is None else weight.float() + 1,
        torch.zeros(dim) if bias is None else bias.float().contiguous(),
        *(value.to(wide).contiguous() for value in (initial.mean, initial.var, none.mean, none.var)),
        {name: place.contiguous() for name, place in places.items()},
        eps,
    )
    state = initial.mean.dtype
    return y.to(x.dtype), Statistics(count[:, -1].clone(), mean.to(state), var.to(state))
