"""Random operator inputs and comparisons, shared by the operator tests."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

gradcheck = partial(torch.autograd.gradcheck, fast_mode=True)
"""Finite differences along random directions of inputs and outputs, not entry by entry: any fault shows in them."""


def relative(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude."""
    if not expected.numel():
        return 0.0
    actual, expected = actual.detach(), expected.detach()
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def cema_inputs(
    batch: int, length: int, dim: int, components: int, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Inputs of `cema` with gradients, |q| < 1."""
    wide = dtype.to_complex()
    phase = torch.rand(dim, components, dtype=dtype) * 6
    q = torch.polar(torch.rand(dim, components, dtype=dtype) * 0.5 + 0.49, phase)
    values = {
        "x": torch.randn(batch, length, dim, dtype=dtype),
        "p": torch.rand(dim, components, dtype=dtype),
        "q": q,
        "gamma": torch.randn(dim, components, dtype=wide),
        "omega": torch.randn(dim, dtype=dtype),
        "initial_state": torch.randn(batch, dim, components, dtype=wide),
    }
    return {name: value.requires_grad_() for name, value in values.items()}


def segments(batch: int, length: int, longest: int) -> Tensor:
    """Random documents of 1 to `longest` tokens."""
    rows = []
    for _ in range(batch):
        sizes: list[int] = []
        while sum(sizes) < length:
            sizes.append(int(torch.randint(1, longest + 1, ())))
        rows.append(torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[:length])
    return torch.stack(rows)


def gradients(outputs: tuple[Tensor, ...], inputs: dict[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    """Gradients of a random weighting of the outputs."""
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(o.shape, dtype=o.dtype, generator=generator) for o in outputs]
    found = torch.autograd.grad(outputs, list(inputs.values()), upstream, allow_unused=True)
    return {name: torch.zeros_like(inputs[name]) if g is None else g for name, g in zip(inputs, found, strict=True)}


def tokens_in_windows(batch: int, length: int, heads: int, dim: int, width: int, *names: str) -> dict[str, Tensor]:
    """float64 leaves [batch, length, heads, .] by name: `width` features for values, `dim` for the others."""
    return {
        name: torch.randn(batch, length, heads, width if "v" in name else dim, dtype=torch.float64).requires_grad_()
        for name in names
    }


def window_places(positions: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Random places of BOS tokens in the chunk before and in the open chunk of rows that have seen `positions`."""
    before = torch.where(positions >= chunk, torch.randint(-2, chunk, positions.shape).clamp(min=-1), -1)
    within = (torch.rand(positions.shape) * (positions % chunk)).long()
    return before, torch.where((positions % chunk > 0) & (torch.rand(positions.shape) < 0.5), within, -1)
