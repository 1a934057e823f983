"""Causal depthwise convolution of a few taps, carried from piece to piece, with SiLU after it where that is wanted."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megalodon.ops import compiled
from megalodon.ops.backend import backend_for
from megalodon.ops.compiled.tables import Convolution
from megalodon.ops.layout import Layout
from megalodon.ops.recent import delayed, recent_after, with_recent

CACHEFUL = 1 << 15
"""Elements that are worked on together, so that all that is made of them stays in the cache."""


class _Plain(torch.autograd.Function):
    """Of rows of one document, a cacheful of tokens at a time: x [B, L, D], recent [B, K - 1, D], weight [D, K], bias
    [D] or None -> [B, L, D]. Nothing but these is kept: backward convolves again where SiLU follows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, recent: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
        ctx.save_for_backward(x, recent, weight, bias)
        ctx.silu = silu
        taps = weight.t().contiguous()
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        for row, before, out in zip(x, recent, y, strict=True):
            for start, tile in _tiles(out):
                _convolve(_around(row, before, start, len(tile)), taps, bias, tile)
                if silu:
                    F.silu(tile, inplace=True)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor):
        x, recent, weight, bias = ctx.saved_tensors
        taps = weight.t().contiguous()
        count = len(taps)
        wanted = ctx.needs_input_grad
        d_joined = x.new_zeros(len(x), count - 1 + x.shape[1], x.shape[2]) if wanted[0] or wanted[1] else None
        d_taps = torch.zeros_like(taps) if wanted[2] else None
        d_bias = torch.zeros_like(taps[0]) if wanted[3] else None
        convolved = x.new_empty(_tokens(x), x.shape[2])
        for number, (row, before, d_row) in enumerate(zip(x, recent, dy, strict=True)):
            for start, tile in _tiles(d_row):
                around = _around(row, before, start, len(tile))
                if ctx.silu:
                    _convolve(around, taps, bias, convolved[: len(tile)])
                    tile = torch.ops.aten.silu_backward(tile, convolved[: len(tile)])
                for tap in range(count):
                    if d_joined is not None:
                        d_joined[number, start + tap : start + tap + len(tile)].addcmul_(tile, taps[tap])
                    if d_taps is not None:
                        d_taps[tap] += (tile * around[tap : tap + len(tile)]).sum(0)
                if d_bias is not None:
                    d_bias += tile.sum(0)
        d_recent, d_x = (None, None) if d_joined is None else (d_joined[:, : count - 1], d_joined[:, count - 1 :])
        return d_x, d_recent, None if d_taps is None else d_taps.t(), d_bias, None


class _Compiled(torch.autograd.Function):
    """The same through `ops.compiled.state_spaces`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, recent: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
        ctx.save_for_backward(x, recent, weight, bias)
        ctx.silu = silu
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        _run("convolve", x, silu, recent=recent, weight=weight.t().contiguous(), bias=bias, y=y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor):
        x, recent, weight, bias = ctx.saved_tensors
        dim, count = weight.shape
        d_joined = x.new_empty(len(x), count - 1 + x.shape[1], dim)
        totals, scratch = x.new_zeros(count + 1, dim, dtype=torch.float64), x.new_zeros(count + 2, dim)
        taps = weight.t().contiguous()
        made = {"dy": dy.contiguous(), "d_joined": d_joined, "totals": totals, "scratch": scratch}
        _run("convolve_back", x, ctx.silu, recent=recent, weight=taps, bias=bias, **made)
        d_taps, d_bias = totals[:count].t().to(x.dtype), totals[count].to(x.dtype)
        return d_joined[:, count - 1 :], d_joined[:, : count - 1], d_taps, None if bias is None else d_bias, None


def _run(name: str, x: Tensor, silu: bool, **tensors: Tensor | None) -> None:
    kernel = compiled.kernel(f"state_spaces.{name}")
    assert kernel is not None, "`_compiles` has asked for it"
    table, weight = np.zeros(len(Convolution), np.int64), tensors["weight"]
    assert weight is not None
    table[[Convolution.rows, Convolution.length, Convolution.dim]] = x.shape
    table[[Convolution.taps, Convolution.silu]] = len(weight), silu
    table[[Convolution.x, Convolution.token_step, Convolution.row_step]] = x.data_ptr(), x.stride(1), x.stride(0)
    kept = {field: tensor.contiguous() for field, tensor in tensors.items() if tensor is not None}
    for field, tensor in kept.items():
        table[getattr(Convolution, field)] = tensor.data_ptr()
    kernel(table, x.numel())


def _compiles(x: Tensor) -> bool:
    if x.device.type != "cpu" or x.dtype != torch.float32 or x.shape[1] == 1 or x.stride(2) != 1:
        return False
    if backend_for(x.device, x.dtype)[0] != "numba":
        return False
    return all(compiled.kernel(f"state_spaces.{name}") is not None for name in ("convolve", "convolve_back"))


def _tokens(x: Tensor) -> int:
    """How many tokens of a row are worked on together."""
    return max(CACHEFUL // x.shape[2], 1) if x.device.type == "cpu" else x.shape[1]


def _tiles(row: Tensor) -> list[tuple[int, Tensor]]:
    """(the first token, a view of the tokens from there on) of [L, D], a cacheful each."""
    size = max(CACHEFUL // row.shape[1], 1) if row.device.type == "cpu" else len(row)
    return [(start, row[start : start + size]) for start in range(0, len(row), size)]


def _around(row: Tensor, before: Tensor, start: int, length: int) -> Tensor:
    """`length` tokens of a row [L, D] from `start` on, with the K - 1 before them in front."""
    first = start - len(before)
    if first >= 0:
        return row[first : start + length]
    return torch.cat([before[start:], row[: start + length]])


def _convolve(around: Tensor, taps: Tensor, bias: Tensor | None, out: Tensor) -> None:
    count, length = len(taps), len(out)
    torch.mul(around[count - 1 :], taps[-1], out=out)
    if bias is not None:
        out += bias
    for tap in reversed(range(count - 1)):
        out.addcmul_(around[tap : tap + length], taps[tap])


def short_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, recent: Tensor | None, layout: Layout, silu: bool = False
) -> tuple[Tensor, Tensor]:
    """`y_t = sum_j weight[:, j] x_{t - K + 1 + j} + bias`: tap K - 1 multiplies the current token.

    Documents begin with zeros before them.

    Args:
        x: [B, L, D].
        weight: [D, K].
        bias: [D] or None.
        recent: [B, K - 1, D]; the tokens before the first. None: zeros.
        layout: the batch's layout.
        silu: give silu(y).

    Returns:
        (y [B, L, D], the last K - 1 tokens of each row [B, K - 1, D]).
    """
    before = weight.shape[1] - 1
    if layout.starts is None and x.dtype == weight.dtype and not torch.compiler.is_compiling() and x.numel():
        recent = x.new_zeros(x.shape[0], before, x.shape[2]) if recent is None else recent.to(x.dtype)
        y = (_Compiled if _compiles(x) else _Plain).apply(x, recent, weight, bias, silu)
        if layout.plain and before <= x.shape[1]:
            return y, x[:, x.shape[1] - before :].clone()
        return y, recent_after(with_recent(recent, x, before), before, layout)
    joined = with_recent(recent, x, before)
    y = delayed(joined, before, 0, layout) * weight[:, -1]
    if bias is not None:
        y = y + bias
    for by in range(1, before + 1):
        y = torch.addcmul(y, delayed(joined, before, by, layout), weight[:, before - by])
    return (F.silu(y) if silu else y), recent_after(joined, before, layout)
