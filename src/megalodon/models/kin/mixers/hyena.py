"""Hyena (arXiv 2302.10866), of order two: a long convolution between two gates, its kernel a network over time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from megalodon import ops
from megalodon.models.kin.config import KinConfig
from megalodon.models.kin.mixers.base import AtLeastOne, Memory, Mixer, MixerParameters, NotNegative, Reference
from megalodon.models.kin.mixers.keys_and_values import KeysAndValues
from megalodon.models.kin.mixers.long_filters import (
    KeptKernel,
    no_inputs,
    read_inputs,
    taps_needed,
    time_features,
)
from megalodon.models.kin.mixers.state_space import DepthwiseConvolution
from megalodon.ops.backend import full_precision
from megalodon.ops.layout import Layout


@dataclass(frozen=True)
class HyenaMemory(Memory):
    """recent: [B, K - 1, 3 D], the short convolution's last inputs; inputs: of the long one, all."""

    recent: Tensor
    inputs: KeysAndValues


class Filter(nn.Module):
    """A kernel [D, taps] of time: a network with sines over features of time, under a decaying window."""

    def __init__(self, dim: int, given: Hyena.Parameters) -> None:
        super().__init__()
        self.max_length, self.shift, self.first_frequency = given.max_length, given.shift, given.frequency
        width = given.filter_width
        self.features = nn.Parameter(torch.empty(given.max_length, given.time_features))
        self.frequency = nn.Parameter(torch.empty(width))
        sizes = [given.time_features] + [width] * (given.inner_layers + 1)
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.out = nn.Linear(width, dim, bias=False)
        self.skip = nn.Parameter(torch.empty(dim))
        self.kept = KeptKernel()

    def initialise(self) -> None:
        """Linear layers as PyTorch begins them: drawn narrowly, they would leave a kernel of nothing."""
        init.copy_(self.features, time_features(*self.features.shape))
        init.constant_(self.frequency, self.first_frequency)
        for layer in (*self.hidden, self.out):
            bound = layer.in_features**-0.5
            init.uniform_(layer.weight, -bound, bound)
            if layer.bias is not None:
                init.uniform_(layer.bias, -bound, bound)
        init.normal_(self.skip)

    def _kernel(self, taps: int) -> Tensor:
        real = full_precision(self.out.weight.dtype)
        hidden = self.features[:taps].to(real)
        for layer in self.hidden:
            assert isinstance(layer, nn.Linear)
            hidden = torch.sin(self.frequency.to(real) * F.linear(hidden, layer.weight.to(real), layer.bias.to(real)))
        kernel = F.linear(hidden, self.out.weight.to(real))
        time = torch.linspace(0, 1, self.max_length, device=kernel.device, dtype=real)[:taps, None]
        slow, fast = math.log(0.01) / 1.5, math.log(0.01) / 0.3
        decay = torch.linspace(slow, fast, kernel.shape[1], device=kernel.device, dtype=real).abs()
        return (kernel * (torch.exp(-time * decay) + self.shift)).t()

    def forward(self, taps: int) -> Tensor:
        """The first `taps` values of each channel's kernel, [D, taps], float32 or better."""
        with torch.autocast(self.out.weight.device.type, enabled=False):
            return self.kept.of(tuple(self.parameters()), self._kernel, taps, self.max_length)


class Hyena(Mixer):
    """`x1, x2, v = conv(Win u); out = Wout (x2 * (k * (v x1) + d v x1))`, k the filter and * its convolution."""

    kind = "growing"

    class Parameters(MixerParameters):
        """max_length: the longest document that can be read; kernel_size: taps of the short convolution;
        filter_width: of the filter's network; inner_layers: of it, beside the first and the last; time_features: odd,
        at least 3; frequency: of its sines at the start; shift: added to the window."""

        max_length: int = 16384
        kernel_size: AtLeastOne = 3
        filter_width: AtLeastOne = 64
        inner_layers: NotNegative = 2
        time_features: int = 5
        frequency: float = 1.0
        shift: float = 0.0

        def check(self, config: KinConfig) -> None:
            if self.max_length < 2:
                raise ValueError(f"hyena: max_length={self.max_length}: it must be at least 2")
            if self.time_features < 3 or self.time_features % 2 == 0:
                raise ValueError(f"hyena: time_features={self.time_features}: it must be odd and at least 3")

    def __init__(self, config: KinConfig, layer_index: int, parameters: Parameters) -> None:
        super().__init__(config, layer_index, parameters)
        dim, self.max_length = config.model_dim, parameters.max_length
        self.dim = dim
        self.in_proj = nn.Linear(dim, 3 * dim)
        self.short_filter = DepthwiseConvolution(3 * dim, parameters.kernel_size, bias=True)
        self.filter = Filter(dim, parameters)
        self.out_proj = nn.Linear(dim, dim)
        self.initialise(config.init_std)

    @torch.no_grad()
    def initialise(self, std: float) -> None:
        self.short_filter.initialise()
        self.filter.initialise()

    def empty(self, batch: int, device: torch.device, dtype: torch.dtype) -> HyenaMemory:
        recent = torch.zeros(batch, self.short_filter.taps - 1, 3 * self.dim, device=device, dtype=dtype)
        return HyenaMemory(recent, no_inputs(batch, self.dim, device, dtype))

    def forward(self, u: Tensor, memory: HyenaMemory | None, layout: Layout) -> tuple[Tensor, HyenaMemory]:
        taps = taps_needed(layout, self.max_length, "hyena")
        memory = self.empty(len(u), u.device, u.dtype) if memory is None else memory
        mixed, recent = self.short_filter(self.in_proj(u), memory.recent, layout)
        first, second, v = mixed.chunk(3, dim=-1)
        gated = v * first
        history, inputs = read_inputs(memory.inputs, gated, layout)
        y, _ = ops.long_convolution(gated, self.filter(taps), self.filter.skip, history, layout=layout)
        return self.out_proj(y * second), HyenaMemory(recent, inputs)

    @classmethod
    def reference(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Reference:
        """Zoology's Hyena, of one head and one block."""
        for name in ("num_heads", "num_blocks"):
            if config.get(name, 1) != 1:
                raise ValueError(f"hyena: {name}={config[name]} is not reproduced: it must be 1")
        if config.get("order", 2) != 2 or config.get("normalized", False):
            raise ValueError("hyena: only order=2 and normalized=False are reproduced")
        layers = config.get("num_inner_mlps", 2)
        parameters = {
            "max_length": config["l_max"],
            "kernel_size": config.get("short_filter_order", 3),
            "filter_width": config.get("filter_order", 64),
            "inner_layers": layers,
            "time_features": config.get("emb_dim", 3),
            "frequency": float(config.get("w", 1)),
            "shift": float(config.get("shift", 0)),
        }
        renamed = {theirs: ours for ours, theirs in reference_names(layers).items()}
        ours = {renamed.get(name, name): tensor for name, tensor in tensors.items()}
        ours["filter.features"] = ours["filter.features"].flatten(0, -2)
        ours["filter.frequency"] = ours["filter.frequency"].flatten()
        return Reference({"model_dim": config["d_model"], "num_heads": 1}, parameters, ours)


def reference_names(inner_layers: int) -> dict[str, str]:
    """Our names of the filter's parameters -> the authors'."""
    names = {
        "filter.features": "filter_fn.pos_emb.z",
        "filter.frequency": "filter_fn.implicit_filter.1.freq",
        "filter.skip": "filter_fn.bias",
        "filter.out.weight": f"filter_fn.implicit_filter.{2 * inner_layers + 2}.weight",
    }
    for i in range(inner_layers + 1):
        for kind in ("weight", "bias"):
            names[f"filter.hidden.{i}.{kind}"] = f"filter_fn.implicit_filter.{2 * i}.{kind}"
    return names
