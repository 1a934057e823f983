"""CEMA on a CPU as the recurrence itself, compiled: see `ops.compiled.average`.

For float32 (and bfloat16, widened) and channels that fill whole vectors; anything else takes the blocked form.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalodon.ops import compiled
from megalodon.ops.compiled.tables import Average
from megalodon.ops.layout import Layout

TOKENS = 16
"""Of a run, whose states the backward pass makes anew: those of 16 channels and components take 34 KiB."""

WIDEST = 16
"""Channels must be a multiple of any CPU's vectors."""


def fits(x: Tensor) -> bool:
    """Whether the kernels take x [B, L, D], and can be had."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
        return False
    if x.shape[-1] % WIDEST or not x.numel() or torch.compiler.is_compiling():
        return False
    return all(compiled.kernel(f"average.{way}") is not None for way in ("forward", "backward"))


def _runs(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """(int64 [B, n, 3]: first token, tokens and whether they begin a document, of each run; int64 [B]: runs)."""
    kept = layout.__dict__.get("_runs")
    if kept is not None:
        return kept
    tables = []
    for row, length in enumerate(layout.lengths.tolist()):
        begins = np.arange(0, length, TOKENS)
        fresh = np.zeros(0, np.int64) if layout.starts is None else np.flatnonzero(layout.starts[row, :length])
        begins = np.union1d(begins, fresh)
        tokens = np.diff(np.append(begins, length))
        tables.append(np.stack([begins, tokens, np.isin(begins, fresh)], axis=1).astype(np.int64).reshape(-1, 3))
    runs = np.zeros((len(tables), max(map(len, tables), default=0), 3), np.int64)
    for row, table in enumerate(tables):
        runs[row, : len(table)] = table
    found = runs, np.array([len(table) for table in tables], np.int64)
    layout.__dict__["_runs"] = found
    return found


def _width() -> int:
    from megalodon.ops.compiled.vectors import WIDTH

    return WIDTH


def _by_vector(state: Tensor, width: int) -> Tensor:
    """Complex [B, D, N] -> real [B, D / W, N, 2, W], contiguous."""
    return torch.view_as_real(state).unflatten(1, (-1, width)).permute(0, 1, 3, 4, 2).contiguous()


def _by_channel(state: Tensor) -> Tensor:
    """The inverse: complex [B, D, N]."""
    return torch.view_as_complex(state.permute(0, 1, 4, 2, 3).flatten(1, 2).contiguous())


class _Average(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, p: Tensor, q: Tensor, gamma: Tensor, omega: Tensor, state: Tensor | None, layout: Layout
    ) -> tuple[Tensor, Tensor]:
        width, (batch, _, dim), components = _width(), x.shape, p.shape[1]
        coefficients = torch.stack([q.real, q.imag, gamma.real, gamma.imag, p])  # [5, D, N]
        coefficients = coefficients.unflatten(1, (-1, width)).permute(1, 3, 0, 2).contiguous()
        states = x.new_zeros(batch, dim // width, components, 2, width) if state is None else _by_vector(state, width)
        entering = states.clone() if state is not None else None
        full = bool((layout.lengths == x.shape[1]).all())
        y = torch.empty_like(x) if full else torch.zeros_like(x)
        _call("average.forward", layout, x, coefficients, omega, states=states, y=y)
        ctx.save_for_backward(x, coefficients, omega, entering)
        ctx.layout, ctx.full = layout, full
        return y, _by_channel(states)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, d_last: Tensor | None):
        x, coefficients, omega, entering = ctx.saved_tensors
        parts, components, _, width = coefficients.shape
        batch = len(x)
        shape = (batch, parts, components, 2, width)
        adjoint = x.new_zeros(shape) if d_last is None else _by_vector(d_last, width)
        dy = torch.zeros_like(x) if dy is None else dy.contiguous()
        dx = torch.empty_like(x) if ctx.full else torch.zeros_like(x)
        sums, d_omega = x.new_empty(batch, parts, components, 5, width), x.new_empty(batch, parts * width)
        needed = ctx.needs_input_grad[5]
        before = x.new_zeros(shape) if entering is None else entering
        _call(
            "average.backward", ctx.layout, x, coefficients, omega,
            states=adjoint, entering=before, y=dx, dy=dy, sums=sums, d_omega=d_omega,
        )  # fmt: skip
        total = sums.sum(0).permute(2, 0, 3, 1).flatten(1, 2)  # [5, D, N]
        d_q, d_gamma = torch.complex(total[0], total[1]), torch.complex(total[2], total[3])
        return dx, total[4], d_q, d_gamma, d_omega.sum(0), _by_channel(adjoint) if needed else None, None


def _call(name: str, layout: Layout, x: Tensor, coefficients: Tensor, omega: Tensor, **tensors: Tensor) -> None:
    kernel = compiled.kernel(name)
    assert kernel is not None, "`fits` has asked for it"
    runs, counts = _runs(layout)
    batch, length, dim = x.shape
    components, most = coefficients.shape[1], runs.shape[1]
    table = np.zeros(len(Average), np.int64)
    if name == "average.backward":
        size = (TOKENS + 1 + most) * 2 * components * coefficients.shape[-1]
        tensors["scratch"] = torch.empty(torch.get_num_threads(), size)
    numbers = {
        "rows": batch,
        "length": length,
        "dim": dim,
        "components": components,
        "runs": runs.ctypes.data,
        "counts": counts.ctypes.data,
        "most_runs": most,
        "longest": TOKENS,
    }
    addresses = {"x": x, "coefficients": coefficients, "omega": omega, **tensors}
    for field, value in (*numbers.items(), *((field, tensor.data_ptr()) for field, tensor in addresses.items())):
        table[getattr(Average, field)] = value
    kernel(table, batch * length)


def cema(
    x: Tensor, p: Tensor, q: Tensor, gamma: Tensor, omega: Tensor | None, initial_state: Tensor | None, layout: Layout
) -> tuple[Tensor, Tensor]:
    """See `megalodon.ops.cema`; for what `fits`."""
    with torch.autocast(x.device.type, enabled=False):
        omega = torch.zeros(x.shape[-1]) if omega is None else omega
        u = x.float().contiguous()
        y, state = _Average.apply(u, p, q, gamma, omega.contiguous(), initial_state, layout)
        return y.to(x.dtype), state
