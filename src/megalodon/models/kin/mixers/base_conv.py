"""The gated convolution of the recall studies ("base conv", arXiv 2312.04927): a convolution times a projection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from megalodon import ops
from megalodon.models.kin.config import KinConfig
from megalodon.models.kin.mixers.base import Kind, Memory, Mixer, MixerParameters, Reference
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

TIME_FEATURES, FILTER_WIDTH = 3, 16


@dataclass(frozen=True)
class ShortMemory(Memory):
    """recent: [B, K - 1, D], the last inputs."""

    recent: Tensor


class LongKernel(nn.Module):
    """A kernel [D, taps]: a table, or a small network over features of time."""

    features: Tensor

    def __init__(self, dim: int, max_length: int, implicit: bool) -> None:
        super().__init__()
        self.implicit, self.max_length = implicit, max_length
        if implicit:
            self.register_buffer("features", time_features(max_length, TIME_FEATURES))
            self.first, self.last = nn.Linear(TIME_FEATURES, FILTER_WIDTH), nn.Linear(FILTER_WIDTH, dim)
        else:
            self.filter = nn.Parameter(torch.empty(dim, max_length))
        self.kept = KeptKernel()

    def initialise(self) -> None:
        """A table drawn from N(0, 1), or linear layers as PyTorch begins them."""
        if not self.implicit:
            init.normal_(self.filter)
            return
        init.copy_(self.features, time_features(*self.features.shape))
        for layer in (self.first, self.last):
            bound = layer.in_features**-0.5
            init.uniform_(layer.weight, -bound, bound)
            init.uniform_(layer.bias, -bound, bound)

    def _kernel(self, taps: int) -> Tensor:
        first, last = self.first, self.last
        real = full_precision(first.weight.dtype)
        hidden = F.relu(F.linear(self.features[:taps].to(real), first.weight.to(real), first.bias.to(real)))
        return F.linear(hidden, last.weight.to(real), last.bias.to(real)).t()

    def forward(self, taps: int) -> Tensor:
        """The first `taps` values of each channel's kernel, [D, taps]."""
        if not self.implicit:
            return self.filter[:, :taps]
        with torch.autocast(self.features.device.type, enabled=False):
            inputs = (self.features, *self.parameters())
            return self.kept.of(inputs, self._kernel, taps, self.max_length)


class BaseConv(Mixer):
    """`out = conv(u) * (W u + b) + u`; a long convolution adds u to its result, too."""

    kind = "constant"

    class Parameters(MixerParameters):
        """kernel_size: taps, or -1 for a kernel as long as the sequence; implicit: that kernel is a network over time,
        not a table; max_length: the longest document that it can read; activation: SiLU on both factors."""

        kernel_size: int = 3
        implicit: bool = True
        max_length: int = 16384
        activation: bool = False

        def check(self, config: KinConfig) -> None:
            if self.kernel_size < 1 and self.kernel_size != -1:
                raise ValueError(f"base_conv: kernel_size={self.kernel_size}: it must be at least 1, or -1 for long")
            if self.max_length < 2:
                raise ValueError(f"base_conv: max_length={self.max_length}: it must be at least 2")

    def __init__(self, config: KinConfig, layer_index: int, parameters: Parameters) -> None:
        super().__init__(config, layer_index, parameters)
        self.dim, self.max_length, self.long = config.model_dim, parameters.max_length, parameters.kernel_size == -1
        self.activation = parameters.activation
        self.projection = nn.Linear(self.dim, self.dim)
        self.conv: LongKernel | DepthwiseConvolution
        if self.long:
            self.conv = LongKernel(self.dim, parameters.max_length, parameters.implicit)
        else:
            self.conv = DepthwiseConvolution(self.dim, parameters.kernel_size, bias=True)
        self.initialise(config.init_std)

    @classmethod
    def kind_with(cls, parameters: MixerParameters) -> Kind:
        assert isinstance(parameters, BaseConv.Parameters)
        return "growing" if parameters.kernel_size == -1 else "constant"

    @torch.no_grad()
    def initialise(self, std: float) -> None:
        self.conv.initialise()

    def empty(self, batch: int, device: torch.device, dtype: torch.dtype) -> KeysAndValues | ShortMemory:
        if isinstance(self.conv, DepthwiseConvolution):
            return ShortMemory(torch.zeros(batch, self.conv.taps - 1, self.dim, device=device, dtype=dtype))
        return no_inputs(batch, self.dim, device, dtype)

    def forward(
        self, u: Tensor, memory: KeysAndValues | ShortMemory | None, layout: Layout
    ) -> tuple[Tensor, KeysAndValues | ShortMemory]:
        memory = self.empty(len(u), u.device, u.dtype) if memory is None else memory
        after: KeysAndValues | ShortMemory
        if isinstance(self.conv, DepthwiseConvolution):
            assert isinstance(memory, ShortMemory)
            convolved, recent = self.conv(u, memory.recent, layout)
            after = ShortMemory(recent)
        else:
            assert isinstance(memory, KeysAndValues)
            taps = taps_needed(layout, self.max_length, "base_conv")
            history, after = read_inputs(memory, u, layout)
            convolved, _ = ops.long_convolution(u, self.conv(taps), u.new_ones(self.dim), history, layout=layout)
        gate = self.projection(u)
        if self.activation:
            convolved, gate = F.silu(convolved), F.silu(gate)
        return convolved * gate + u, after

    @classmethod
    def reference(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Reference:
        """Zoology's gated convolution."""
        size = config.get("kernel_size", 3)
        if isinstance(size, list):
            raise ValueError(f"base_conv: kernel_size={size}: bring over one layer, with its own kernel_size")
        parameters = {
            "kernel_size": size,
            "implicit": config.get("implicit_long_conv", True),
            "max_length": config["l_max"],
            "activation": config.get("use_act", False),
        }
        ours = {REFERENCE_NAMES.get(name, name): tensor for name, tensor in tensors.items()}
        if "conv.pos_emb.z" in ours:
            ours["conv.features"] = ours.pop("conv.pos_emb.z").flatten(0, -2)
        return Reference({"model_dim": config["d_model"], "num_heads": 1}, parameters, ours)


REFERENCE_NAMES = {
    f"conv.{theirs}.{kind}": f"conv.{ours}{kind}"
    for theirs, ours in (("conv", ""), ("mlp.0", "first."), ("mlp.2", "last."))
    for kind in ("weight", "bias")
}
"""The authors' names of parameters -> ours."""
