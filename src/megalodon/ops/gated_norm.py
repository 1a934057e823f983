"""`rms_norm(y * silu(z)) * weight`, the end of Mamba-2's layer, in one pass over memory: see `megalodon.ops.gate`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megalodon.ops import compiled
from megalodon.ops.backend import backend_for, full_precision
from megalodon.ops.compiled.tables import GatedNorm

CACHEFUL = 1 << 15
"""Elements of each tensor that are worked on together on a CPU."""


class _GatedNorm(torch.autograd.Function):
    """y, z [n, D] of one dtype, weight [D]; a few rows at a time, in float32 or better."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
        ctx.save_for_backward(y, z, weight)
        ctx.groups, ctx.eps = groups, eps
        out = torch.empty_like(y, memory_format=torch.contiguous_format)
        wide = weight.to(full_precision(y.dtype))
        for y_t, z_t, out_t in _tiles(y, z, out):
            gated = F.silu(z_t.to(wide.dtype)).mul_(y_t)
            parts = gated.unflatten(-1, (groups, -1))
            parts *= _scale(parts, eps)
            torch.mul(gated, wide, out=gated)
            out_t.copy_(gated)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor):
        y, z, weight = ctx.saved_tensors
        groups, wide = ctx.groups, weight.to(full_precision(y.dtype))
        dy, dz = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (y, z))
        d_weight = torch.zeros_like(wide)
        for d_t, y_t, z_t, dy_t, dz_t in _tiles(d_out, y, z, dy, dz):
            d, u, v = (x.to(wide.dtype) for x in (d_t, y_t, z_t))
            gate = F.silu(v)
            parts = (gate * u).unflatten(-1, (groups, -1))
            scale = _scale(parts, ctx.eps)
            normed = parts.mul_(scale)
            d_weight += (normed.flatten(-2) * d).sum(0)
            d_normed = (d * wide).unflatten(-1, (groups, -1))
            along = (d_normed * normed).mean(-1, keepdim=True)
            d_gated = d_normed.sub_(normed.mul_(along)).mul_(scale).flatten(-2)
            dy_t.copy_(gate.mul_(d_gated))
            dz_t.copy_(torch.ops.aten.silu_backward(d_gated.mul_(u), v))
        return dy, dz, d_weight.to(weight.dtype), None, None


class _Compiled(torch.autograd.Function):
    """The same through `ops.compiled.state_spaces`, of float32."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
        y = y.contiguous()
        ctx.save_for_backward(y, z, weight)
        ctx.groups, ctx.eps = groups, eps
        out = torch.empty_like(y)
        _run("norm", y, z, weight, groups, eps, out=out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor):
        y, z, weight = ctx.saved_tensors
        dy, dz = torch.empty_like(y), torch.empty_like(y)
        threads = torch.get_num_threads()
        totals, scratch = y.new_zeros(threads, len(weight), dtype=torch.float64), y.new_zeros(threads, len(weight))
        made = {"out": d_out.contiguous(), "dy": dy, "dz": dz, "totals": totals, "scratch": scratch}
        _run("norm_back", y, z, weight, ctx.groups, ctx.eps, **made)
        return dy, dz, totals.sum(0).to(weight.dtype), None, None


def _run(name: str, y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float, **tensors: Tensor) -> None:
    kernel = compiled.kernel(f"state_spaces.{name}")
    assert kernel is not None, "`_compiles` has asked for it"
    table, wide_eps, weight = np.zeros(len(GatedNorm), np.int64), np.array([eps]), weight.contiguous()
    table[[GatedNorm.rows, GatedNorm.dim]] = y.shape
    table[[GatedNorm.groups, GatedNorm.z_step]] = groups, z.stride(0)
    table[[GatedNorm.y, GatedNorm.z, GatedNorm.weight]] = y.data_ptr(), z.data_ptr(), weight.data_ptr()
    table[GatedNorm.eps] = wide_eps.ctypes.data
    for field, tensor in tensors.items():
        table[getattr(GatedNorm, field)] = tensor.data_ptr()
    kernel(table, y.numel())


def _compiles(y: Tensor, z: Tensor, weight: Tensor) -> bool:
    if y.device.type != "cpu" or any(x.dtype != torch.float32 for x in (y, z, weight)):
        return False
    if len(y) < 2 or z.stride(1) != 1 or backend_for(y.device, y.dtype)[0] != "numba":
        return False
    return all(compiled.kernel(f"state_spaces.{name}") is not None for name in ("norm", "norm_back"))


def _scale(parts: Tensor, eps: float) -> Tensor:
    """1 over the root mean square of each part."""
    return torch.rsqrt(parts.square().mean(-1, keepdim=True).add_(eps))


def _tiles(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of tensors [n, D], a few at a time."""
    rows, width = tensors[0].shape
    size = max(CACHEFUL // max(width, 1), 1) if tensors[0].device.type == "cpu" else max(rows, 1)
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """`y * silu(z)` over the root mean square of each of its `groups` equal parts, times `weight`.

    Computed in float32 (float64 for float64 input).

    Args:
        y, z: [..., D] of one shape and floating dtype.
        weight: [D].
        groups: divides D.
        eps: added to mean squares.

    Returns:
        [..., D] in the dtype of y.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    if y.shape != z.shape or y.dtype != z.dtype:
        raise ValueError(f"y is {y.dtype} {tuple(y.shape)} and z {z.dtype} {tuple(z.shape)}: they must be alike")
    width = y.shape[-1]
    if weight.shape != (width,) or groups < 1 or width % groups:
        raise ValueError(f"weight of shape {tuple(weight.shape)} and {groups} groups do not fit {width} numbers")
    if torch.compiler.is_compiling():
        parts = (y.to(full_precision(y.dtype)) * F.silu(z.to(full_precision(y.dtype)))).unflatten(-1, (groups, -1))
        return ((parts * _scale(parts, eps)).flatten(-2) * weight).to(y.dtype)
    rows = y.reshape(-1, width), z.reshape(-1, width)
    form = _Compiled if _compiles(*rows, weight) else _GatedNorm
    result: Tensor = form.apply(*rows, weight, groups, eps)
    return result.view(y.shape)
