"""Mamba (arXiv 2312.00752): a selective scan with a decay for each channel and component, between two projections."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from megalodon import ops
from megalodon.models.implicit import Path, banded
from megalodon.models.kin.config import KinConfig
from megalodon.models.kin.mixers.base import (
    AtLeastOne,
    Kind,
    Mixer,
    MixerParameters,
    NotNegativeFloat,
    Positive,
    Reference,
)
from megalodon.models.kin.mixers.state_space import (
    DepthwiseConvolution,
    ScanMemory,
    rates_of,
    step_bias_,
    steps_of,
)
from megalodon.ops.layout import Layout


class Mamba(Mixer):
    """`x, z = Win u; x = silu(conv x); y = scan(x) + D x; out = Wout (y * silu z)`; see `ops.selective_scan`."""

    kind: ClassVar[Kind] = "constant"

    class Parameters(MixerParameters):
        """expand: E / D; state_size: N; kernel_size: taps of the convolution; step_rank: rank of the steps'
        projection (None: D / 16, rounded up); bias, conv_bias: of the projections and the convolution; step_min,
        step_max, step_floor: of the steps at the start."""

        expand: AtLeastOne = 2
        state_size: AtLeastOne = 16
        kernel_size: AtLeastOne = 4
        step_rank: AtLeastOne | None = None
        bias: bool = False
        conv_bias: bool = True
        step_min: Positive = 0.001
        step_max: Positive = 0.1
        step_floor: NotNegativeFloat = 1e-4

        def check(self, config: KinConfig) -> None:
            if self.step_min > self.step_max:
                raise ValueError(f"mamba: step_min={self.step_min}: it must be at most step_max={self.step_max}")

    def __init__(self, config: KinConfig, layer_index: int, parameters: Parameters) -> None:
        super().__init__(config, layer_index, parameters)
        dim, self.parameters_given, self.layers = config.model_dim, parameters, config.num_layers
        self.inner, self.state_size = parameters.expand * dim, parameters.state_size
        self.step_rank = parameters.step_rank or math.ceil(dim / 16)
        self.in_proj = nn.Linear(dim, 2 * self.inner, bias=parameters.bias)
        self.conv1d = DepthwiseConvolution(self.inner, parameters.kernel_size, parameters.conv_bias)
        self.x_proj = nn.Linear(self.inner, self.step_rank + 2 * self.state_size, bias=False)
        self.dt_proj = nn.Linear(self.step_rank, self.inner)
        self.A_log = nn.Parameter(torch.empty(self.inner, self.state_size))
        self.D = nn.Parameter(torch.empty(self.inner))
        self.out_proj = nn.Linear(self.inner, dim, bias=parameters.bias)
        self.initialise(config.init_std)

    @torch.no_grad()
    def initialise(self, std: float) -> None:
        given = self.parameters_given
        self.conv1d.initialise()
        init.copy_(self.A_log, torch.arange(1.0, self.state_size + 1).log().expand(self.inner, -1))
        init.ones_(self.D)
        bound = self.step_rank**-0.5
        init.uniform_(self.dt_proj.weight, -bound, bound)
        step_bias_(self.dt_proj.bias, given.step_min, given.step_max, given.step_floor)
        bound = (self.inner * self.layers) ** -0.5  # Kaiming's with a = sqrt 5, divided by sqrt(layers)
        init.uniform_(self.out_proj.weight, -bound, bound)

    def empty(self, batch: int, device: torch.device, dtype: torch.dtype) -> ScanMemory:
        return ScanMemory.empty(batch, self.conv1d.taps, self.inner, (self.inner, self.state_size), device, dtype)

    def opened(self, u: Tensor, memory: ScanMemory | None, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """(the convolved x [B, L, E], the gate z [B, L, E], the convolution's last inputs)."""
        x, z = self.in_proj(u).chunk(2, dim=-1)
        x, recent = self.conv1d(x, None if memory is None else memory.recent, layout, silu=True)
        return x, z, recent

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(steps [B, L, E], b and c [B, L, N]) of the convolved x [B, L, E]."""
        rank, b, c = self.x_proj(x).split([self.step_rank, self.state_size, self.state_size], dim=-1)
        return steps_of(F.linear(rank, self.dt_proj.weight), self.dt_proj.bias), b, c

    def scanned(self, x: Tensor, memory: ScanMemory | None, layout: Layout) -> tuple[Tensor, Tensor]:
        """(scan(x) + D x, the scan's state)."""
        dt, b, c = self.weights(x)
        state = None if memory is None else memory.state
        return ops.selective_scan(x, dt, rates_of(self.A_log), b, c, self.D, state, layout=layout)

    def scan_matrix(self, x: Tensor) -> Tensor:
        """[B, E, L, L]: what the scan, without its skip, multiplies the convolved x [B, L, E] with."""
        dt, b, c = self.weights(x)
        rates, length = rates_of(self.A_log), x.shape[1]
        ends = dt.cumsum(1).transpose(1, 2)
        between = (ends[..., :, None] - ends[..., None, :]).tril()
        total = torch.zeros_like(between)
        for n in range(self.state_size):
            weights = c[:, :, n, None] * b[:, None, :, n]
            total += torch.exp(rates[:, n, None, None] * between) * weights[:, None]
        seen = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        return total.masked_fill(~seen, 0) * dt.transpose(1, 2)[:, :, None]

    def paths(self, u: Tensor, layout: Layout) -> list[Path]:
        values = self.in_proj(u).chunk(2, dim=-1)[0]
        x, z, _ = self.opened(u, None, layout)
        convolved = self.conv1d(values, None, layout)[0]
        matrix = self.scan_matrix(x) + torch.diag_embed(self.D[:, None].expand(-1, u.shape[1]))
        matrix = matrix * torch.sigmoid(convolved).transpose(1, 2)[:, :, None]  # silu(c) = c sigmoid(c)
        gate, constant = F.silu(z)[..., None], None
        if self.conv1d.bias is not None:
            constant = gate * torch.einsum("bets,e->bte", matrix, self.conv1d.bias)[..., None]
        matrix = matrix @ banded(self.conv1d.weight[:, 0], u.shape[1])
        outputs = (self.scanned(x, None, layout)[0] * F.silu(z))[..., None]
        bias = self.out_proj.bias
        return [Path("scan", values[..., None], ((matrix, gate),), outputs, self.out_proj.weight, constant, bias)]

    def forward(self, u: Tensor, memory: ScanMemory | None, layout: Layout) -> tuple[Tensor, ScanMemory]:
        x, z, recent = self.opened(u, memory, layout)
        y, state = self.scanned(x, memory, layout)
        return self.out_proj(y * F.silu(z)), ScanMemory(recent, state)

    @classmethod
    def reference(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Reference:
        """The authors' layer, or that of Transformers, whose parameters have the same names."""
        fields, parameters = mamba_options(config)
        return Reference(fields, {**parameters, "bias": "in_proj.bias" in tensors}, dict(tensors))


def mamba_options(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(fields of a `KinConfig`, parameters of `Mamba`) for the options of the authors' layer or of Transformers'."""
    if not config.get("dt_softplus", True):
        raise ValueError("mamba: dt_softplus=False is not reproduced: steps go through softplus")
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ValueError(f"mamba: hidden_act={activation!r} is not reproduced: it must be 'silu'")
    names = {
        "state_size": ("d_state", "state_size", "state"),
        "kernel_size": ("d_conv", "conv_kernel"),
        "step_rank": ("dt_rank", "time_step_rank", "rank"),
        "expand": ("expand",),
        "conv_bias": ("conv_bias", "use_conv_bias"),
    }
    parameters = {
        ours: next(config[theirs] for theirs in known if theirs in config)
        for ours, known in names.items()
        if any(theirs in config for theirs in known)
    }
    if parameters.get("step_rank") == "auto":
        del parameters["step_rank"]
    width = next((config[name] for name in ("d_model", "hidden_size", "hidden") if name in config), None)
    if width is None:
        raise KeyError("d_model")
    heads = next(heads for heads in (4, 2, 1) if width % heads == 0)
    return {"model_dim": width, "num_heads": heads}, parameters
