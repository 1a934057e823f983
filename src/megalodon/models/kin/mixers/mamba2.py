"""Mamba-2 (arXiv 2405.21060): a selective scan with one decay a head, a convolution over all that it reads, a gated
norm after it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from megalodon import ops
from megalodon.models.implicit import Path, banded, of_probe, probe
from megalodon.models.kin.config import KinConfig
from megalodon.models.kin.mixers.base import AtLeastOne, Mixer, MixerParameters, NotNegativeFloat, Positive, Reference
from megalodon.models.kin.mixers.state_space import (
    DepthwiseConvolution,
    ScanMemory,
    grouped_rms_norm,
    rates_of,
    step_bias_,
    steps_of,
)
from megalodon.ops.layout import Layout


class GroupedNorm(nn.Module):
    """RMS norm over each of G parts of E channels, with a weight a channel."""

    def __init__(self, channels: int, groups: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.groups, self.eps = groups, eps

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """x, or x * silu(z), [..., E] -> [..., E]."""
        if z is None:
            return grouped_rms_norm(x, self.weight, self.groups, self.eps)
        return ops.gated_rms_norm(x, z, self.weight, self.groups, self.eps)


class Mamba2(Mixer):
    """`z, xBC, dt = Win u; x, B, C = silu(conv xBC); out = Wout norm(y * silu z)`, y the scan of x with its skip."""

    kind = "constant"

    class Parameters(MixerParameters):
        """expand: E / D; head_dim: P (None: 64, or its largest part that divides E); state_size: N; groups: of heads
        that share B and C; kernel_size: taps of the convolution; norm_before_gate: norm(y) * silu(z) instead;
        norm_groups: parts that are normalised alone (None: groups); step_least, step_most: limits of the steps (None:
        no limit); step_min, step_max, step_floor: of the steps at the start; rate_min, rate_max: of the decays at the
        start."""

        expand: AtLeastOne = 2
        head_dim: AtLeastOne | None = None
        state_size: AtLeastOne = 128
        groups: AtLeastOne = 1
        kernel_size: AtLeastOne = 4
        bias: bool = False
        conv_bias: bool = True
        norm_eps: NotNegativeFloat = 1e-5
        norm_before_gate: bool = False
        norm_groups: AtLeastOne | None = None
        step_least: NotNegativeFloat = 0.0
        step_most: Positive | None = None
        step_min: Positive = 0.001
        step_max: Positive = 0.1
        step_floor: NotNegativeFloat = 1e-4
        rate_min: Positive = 1.0
        rate_max: Positive = 16.0

        def head_of(self, inner: int) -> int:
            """P for E channels."""
            return math.gcd(inner, 64) if self.head_dim is None else self.head_dim

        def check(self, config: KinConfig) -> None:
            for least, most in (("step_min", "step_max"), ("rate_min", "rate_max")):
                if getattr(self, least) > getattr(self, most):
                    raise ValueError(
                        f"mamba2: {least}={getattr(self, least)}: it must be at most {most}={getattr(self, most)}"
                    )
            inner = self.expand * config.model_dim
            head = self.head_of(inner)
            if inner % head:
                raise ValueError(f"mamba2: head_dim={head} does not divide the {inner} channels (expand * model_dim)")
            if (inner // head) % self.groups:
                raise ValueError(f"mamba2: groups={self.groups} does not divide the {inner // head} heads")
            if inner % (self.norm_groups or self.groups):
                raise ValueError(f"mamba2: norm_groups={self.norm_groups} does not divide the {inner} channels")
            if self.step_most is not None and self.step_least >= self.step_most:
                raise ValueError(
                    f"mamba2: step_least={self.step_least}: it must be less than step_most={self.step_most}"
                )

    def __init__(self, config: KinConfig, layer_index: int, parameters: Parameters) -> None:
        super().__init__(config, layer_index, parameters)
        given = self.given = parameters
        self.inner = given.expand * config.model_dim
        self.head_dim = given.head_of(self.inner)
        self.heads = self.inner // self.head_dim
        self.channels = self.inner + 2 * given.groups * given.state_size
        self.in_proj = nn.Linear(config.model_dim, self.inner + self.channels + self.heads, bias=given.bias)
        self.conv1d = DepthwiseConvolution(self.channels, given.kernel_size, given.conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.D = nn.Parameter(torch.empty(self.heads))
        self.norm = GroupedNorm(self.inner, given.norm_groups or given.groups, given.norm_eps)
        self.out_proj = nn.Linear(self.inner, config.model_dim, bias=given.bias)
        self.initialise(config.init_std)

    @torch.no_grad()
    def initialise(self, std: float) -> None:
        given = self.given
        self.conv1d.initialise()
        step_bias_(self.dt_bias, given.step_min, given.step_max, given.step_floor)
        rates = torch.empty_like(self.A_log).uniform_(given.rate_min, given.rate_max)
        init.copy_(self.A_log, rates.log())
        init.ones_(self.D)
        init.ones_(self.norm.weight)

    def empty(self, batch: int, device: torch.device, dtype: torch.dtype) -> ScanMemory:
        state = (self.heads, self.head_dim, self.given.state_size)
        return ScanMemory.empty(batch, self.conv1d.taps, self.channels, state, device, dtype)

    def forward(self, u: Tensor, memory: ScanMemory | None, layout: Layout) -> tuple[Tensor, ScanMemory]:
        z, mixed, raw = self._opened(u)
        mixed, recent = self.conv1d(mixed, None if memory is None else memory.recent, layout, silu=True)
        x = mixed[..., : self.inner].unflatten(-1, (self.heads, -1))
        y, state = self._scanned(x, mixed, raw, None if memory is None else memory.state, layout)
        return self.out_proj(self._normed(y.flatten(-2), z)), ScanMemory(recent, state)

    def _opened(self, u: Tensor) -> tuple[Tensor, ...]:
        """(the gate z, what enters the convolution, the steps before their bias)."""
        return self.in_proj(u).split([self.inner, self.channels, self.heads], dim=-1)

    def _scanned(
        self, x: Tensor, mixed: Tensor, raw: Tensor, state: Tensor | None, layout: Layout
    ) -> tuple[Tensor, Tensor]:
        """The scan of x [B, L, H, P] with its skip, weighted by what `mixed` became; and the state after it."""
        given = self.given
        weights = given.groups * given.state_size
        b, c = mixed[..., self.inner :].split([weights, weights], dim=-1)
        b, c = (value.unflatten(-1, (given.groups, -1)) for value in (b, c))
        dt = steps_of(raw, self.dt_bias)
        if given.step_least > 0 or given.step_most is not None:
            dt = dt.clamp(given.step_least, given.step_most)
        return ops.selective_scan(x, dt, rates_of(self.A_log), b, c, self.D, state, layout=layout)

    def _normed(self, y: Tensor, z: Tensor) -> Tensor:
        """y [B, L, E] gated and normalised."""
        return self.norm(y) * F.silu(z) if self.given.norm_before_gate else self.norm(y, z)

    def paths(self, u: Tensor, layout: Layout) -> list[Path]:
        z, mixed, raw = self._opened(u)
        values, convolved = mixed[..., : self.inner], self.conv1d(mixed, None, layout)[0]
        c = convolved[..., : self.inner]
        activated = F.silu(convolved)
        x = activated[..., : self.inner].unflatten(-1, (self.heads, -1))
        y = self._scanned(x, activated, raw, None, layout)[0].flatten(-2)
        scan = of_probe(self._scanned(probe(x), activated, raw, None, layout)[0])  # [B, heads, L, L], the skip within
        matrix = scan.repeat_interleave(self.head_dim, 1) * torch.sigmoid(c).transpose(1, 2)[:, :, None]
        normed = y if self.given.norm_before_gate else y * F.silu(z)
        mean = normed.unflatten(-1, (self.norm.groups, -1)).square().mean(-1, keepdim=True)
        scale = torch.rsqrt(mean + self.norm.eps).expand(*mean.shape[:-1], self.inner // self.norm.groups).flatten(-2)
        gate, constant = (F.silu(z) * scale * self.norm.weight)[..., None], None
        if self.conv1d.bias is not None:
            constant = gate * torch.einsum("bets,e->bte", matrix, self.conv1d.bias[: self.inner])[..., None]
        matrix = matrix @ banded(self.conv1d.weight[: self.inner, 0], u.shape[1])
        outputs = self._normed(y, z)[..., None]
        weight, bias = self.out_proj.weight, self.out_proj.bias
        return [Path("scan", values[..., None], ((matrix, gate),), outputs, weight, constant, bias)]

    @classmethod
    def reference(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Reference:
        """The authors' layer, or that of Transformers, whose parameters have the same names."""
        fields, parameters = mamba2_options(config)
        return Reference(fields, {**parameters, "bias": "in_proj.bias" in tensors}, dict(tensors))


def mamba2_options(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(fields of a `KinConfig`, parameters of `Mamba2`) for the options of the authors' layer or of Transformers'."""
    activation = config.get("hidden_act", config.get("activation", "silu"))
    if activation not in ("silu", "swish"):
        raise ValueError(f"mamba2: hidden_act={activation!r} is not reproduced: it must be 'silu'")
    names = {
        "state_size": ("d_state", "state_size"),
        "kernel_size": ("d_conv", "conv_kernel"),
        "head_dim": ("headdim", "head_dim"),
        "groups": ("ngroups", "n_groups"),
        "expand": ("expand",),
        "norm_before_gate": ("norm_before_gate",),
        "conv_bias": ("conv_bias", "use_conv_bias"),
        "norm_eps": ("layer_norm_epsilon",),
    }
    parameters = {
        ours: next(config[theirs] for theirs in known if theirs in config)
        for ours, known in names.items()
        if any(theirs in config for theirs in known)
    }
    parameters.setdefault("head_dim", 64)
    least, most = (float(limit) for limit in config.get("dt_limit", config.get("time_step_limit", (0.0, math.inf))))
    parameters |= {"step_least": least, "step_most": None if math.isinf(most) else most}
    width = config["d_model"] if "d_model" in config else config["hidden_size"]
    heads = next(heads for heads in (4, 2, 1) if width % heads == 0)
    return {"model_dim": width, "num_heads": heads}, parameters
