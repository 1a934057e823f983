"""TimestepDecayNorm on a CPU, token by token and compiled: see `ops.compiled.decay_norms`.

For float32 (and bfloat16, widened); statistics run in float64. Kept for the backward pass: x, and for each group and
token a centre and a scale.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalodon.ops import compiled
from megalodon.ops.compiled.tables import DecayNorm
from megalodon.ops.timestep_decay_norm.blocked import counts, places_of
from megalodon.ops.timestep_decay_norm.statistics import Decay, DecayedStatistics, correction


def fits(x: Tensor) -> bool:
    """Whether the kernels take x [B, L, D], and can be had; single tokens are as quick without."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
        return False
    if not x.numel() or x.shape[1] == 1 or torch.compiler.is_compiling():
        return False
    return all(compiled.kernel(f"decay_norms.{way}") is not None for way in ("forward", "backward"))


class _DecayNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, places: dict[str, Tensor],
        decay: Decay, eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        groups = mean.shape[1]
        y, last, last_var = torch.empty_like(x), mean.clone(), var.clone()
        centres, scales = (x.new_empty(*x.shape[:2], groups) for _ in range(2))
        tensors = {"x": x, "weight": weight, "centres": centres, "scales": scales, **places}
        _call("decay_norms.forward", x.shape, groups, decay, eps, y=y, bias=bias, mean=last, var=last_var, **tensors)
        ctx.save_for_backward(x, weight, centres, scales)
        ctx.places, ctx.decay, ctx.eps = places, decay, eps
        return y, last, last_var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, d_mean: Tensor | None, d_var: Tensor | None):
        x, weight, centres, scales = ctx.saved_tensors
        batch, _, dim = x.shape
        dx, dy = torch.empty_like(x), torch.zeros_like(x) if dy is None else dy.contiguous()
        to_mean, to_var = (
            x.new_zeros(batch, centres.shape[2], dtype=torch.float64)
            if value is None
            else value.clone(memory_format=torch.contiguous_format)
            for value in (d_mean, d_var)
        )
        d_weight, d_bias = x.new_zeros(batch, dim), x.new_zeros(batch, dim)
        tensors = {"x": x, "weight": weight, "centres": centres, "scales": scales, **ctx.places}
        _call(
            "decay_norms.backward", x.shape, centres.shape[2], ctx.decay, ctx.eps, y=dx, dy=dy, mean=to_mean,
            var=to_var, d_weight=d_weight, d_bias=d_bias, **tensors,
        )  # fmt: skip
        return dx, d_weight.sum(0), d_bias.sum(0), to_mean, to_var, None, None, None


def _call(name: str, shape: torch.Size, groups: int, decay: Decay, eps: float, **tensors: Tensor) -> None:
    kernel = compiled.kernel(name)
    assert kernel is not None, "`fits` has asked for it"
    table, wide_eps, betas = np.zeros(len(DecayNorm), np.int64), np.array([eps]), np.array(decay)
    table[[DecayNorm.rows, DecayNorm.length, DecayNorm.dim, DecayNorm.groups]] = *shape, groups
    table[[DecayNorm.eps, DecayNorm.betas]] = wide_eps.ctypes.data, betas.ctypes.data
    for field, tensor in tensors.items():
        table[getattr(DecayNorm, field)] = tensor.data_ptr()
    kernel(table, shape.numel())


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
    """See `megalodon.ops.timestep_decay_norm`; for what `fits`."""
    batch, length, dim = x.shape
    wide = torch.float64
    count = counts(places_of(x, padding_mask, restart), initial.count, padding_mask, restart).expand(batch, length)
    none = torch.zeros(batch, length, dtype=torch.uint8)
    places = {
        "restart": none if restart is None else restart.to(torch.uint8).contiguous(),
        "real": none + 1 if padding_mask is None else (~padding_mask).to(torch.uint8).contiguous(),
        "corrections": torch.stack([correction(beta, count, wide).reciprocal() for beta in decay], dim=-1),
    }
    y, mean, var = _DecayNorm.apply(
        x.float().contiguous(),
        torch.ones(dim) if weight is None else weight.float() + 1,
        torch.zeros(dim) if bias is None else bias.float().contiguous(),
        initial.mean.to(wide).contiguous(),
        initial.var.to(wide).contiguous(),
        places,
        decay,
        eps,
    )
    state = initial.mean.dtype
    return y.to(x.dtype), DecayedStatistics(count[:, -1].clone(), mean.to(state), var.to(state))
