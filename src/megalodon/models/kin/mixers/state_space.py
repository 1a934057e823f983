"""What the state-space mixers share: a short convolution as a module, steps and their first values, a grouped norm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from megalodon import ops
from megalodon.models.kin.mixers.base import Memory
from megalodon.ops.backend import full_precision
from megalodon.ops.layout import Layout


@dataclass(frozen=True)
class ScanMemory(Memory):
    """recent: [B, K - 1, channels], the convolution's last inputs; state: of the scan, [B, ...], at least float32."""

    PARTS: ClassVar[Mapping[str, frozenset[str]]] = MappingProxyType(
        {"state": frozenset({"state"}), "convolution": frozenset({"recent"})}
    )

    recent: Tensor
    state: Tensor

    @staticmethod
    def empty(
        batch: int, taps: int, channels: int, state: tuple[int, ...], device: torch.device, dtype: torch.dtype
    ) -> ScanMemory:
        """Of rows that have read nothing."""
        return ScanMemory(
            torch.zeros(batch, taps - 1, channels, device=device, dtype=dtype),
            torch.zeros(batch, *state, device=device, dtype=full_precision(dtype)),
        )


class DepthwiseConvolution(nn.Module):
    """A kernel of a few taps for each channel, under the names of `nn.Conv1d`: weight [D, 1, K], bias [D] or None."""

    def __init__(self, channels: int, taps: int, bias: bool) -> None:
        super().__init__()
        self.taps = taps
        self.weight = nn.Parameter(torch.empty(channels, 1, taps))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def initialise(self) -> None:
        """As `nn.Conv1d` begins."""
        bound = 1 / math.sqrt(self.taps)
        init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, recent: Tensor | None, layout: Layout, silu: bool = False) -> tuple[Tensor, Tensor]:
        """Causal: x [B, L, D] and the last inputs before it -> (y, or silu(y), the last inputs after it)."""
        return ops.short_convolution(x, self.weight[:, 0], self.bias, recent, layout, silu)


def step_bias_(bias: Tensor, smallest: float, largest: float, floor: float) -> None:
    """Fill with the inverse softplus of steps drawn log-uniformly from [smallest, largest], at least `floor`."""
    logs = torch.rand(bias.shape, device=bias.device) * math.log(largest / smallest) + math.log(smallest)
    steps = logs.exp().clamp(min=floor)
    init.copy_(bias, steps + torch.log(-torch.expm1(-steps)))


def grouped_rms_norm(x: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """RMS norm over each of the `groups` equal parts of the last dimension, in float32 or better."""
    wide = x.to(full_precision(x.dtype)).unflatten(-1, (groups, -1))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed.flatten(-2) * weight).to(x.dtype)


def steps_of(raw: Tensor, bias: Tensor | None) -> Tensor:
    """softplus(raw + bias) in float32 or better."""
    wide = raw.to(full_precision(raw.dtype))
    return F.softplus(wide if bias is None else wide + bias)


def rates_of(log_rates: Tensor) -> Tensor:
    """-exp(log_rates) in float32 or better: the decays of a unit of time, in logarithm."""
    return -torch.exp(log_rates.to(full_precision(log_rates.dtype)))
