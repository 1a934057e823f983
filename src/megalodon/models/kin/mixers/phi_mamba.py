"""MOHAWK's mixer, of Phi-Mamba (arXiv 2408.10189): Mamba-2's recurrence with a decay of its own for each head and
token, no step sizes, and a bias on the gate. Written so that it can imitate an attention matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from megalodon import ops
from megalodon.models.kin.config import KinConfig
from megalodon.models.kin.mixers.base import AtLeastOne, Mixer, MixerParameters, Reference
from megalodon.models.kin.mixers.state_space import DepthwiseConvolution, ScanMemory
from megalodon.ops.backend import full_precision
from megalodon.ops.layout import Layout, document_numbers

OPEN_GATE = 1.2784645
"""b with silu(b) = 1: the gate lets everything through where z is 0."""

ACTIVATIONS = {"identity": nn.Identity(), "silu": nn.SiLU(), "swish": nn.SiLU()}


class PhiMamba(Mixer):
    """`S_t = sigmoid(-A_t) S_{t-1} + x_t B_t^T`, `out = Wout ((S_t C_t + D x_t) * silu(z_t + z_bias))`."""

    kind = "constant"

    class Parameters(MixerParameters):
        """expand: E / D; state_size: N; query_heads: of B and C (None: num_heads); value_heads: of x (None:
        query_heads); kernel_size: taps of the convolution; activation: after it, "identity" or "silu"."""

        expand: AtLeastOne = 1
        state_size: AtLeastOne = 64
        query_heads: AtLeastOne | None = None
        value_heads: AtLeastOne | None = None
        kernel_size: AtLeastOne = 4
        activation: str = "identity"

        def check(self, config: KinConfig) -> None:
            queries = self.query_heads or config.num_heads
            values = self.value_heads or queries
            if values % queries:
                raise ValueError(f"phi_mamba: value_heads={values} is not divisible by query_heads={queries}")
            if (self.expand * config.model_dim) % values:
                raise ValueError(
                    f"phi_mamba: value_heads={values} does not divide the {self.expand * config.model_dim} channels"
                )
            if self.activation not in ACTIVATIONS:
                raise ValueError(f"phi_mamba: activation={self.activation!r}: it must be one of {list(ACTIVATIONS)}")

    def __init__(self, config: KinConfig, layer_index: int, parameters: Parameters) -> None:
        super().__init__(config, layer_index, parameters)
        self.inner, self.state_size = parameters.expand * config.model_dim, parameters.state_size
        self.query_heads = parameters.query_heads or config.num_heads
        self.value_heads = parameters.value_heads or self.query_heads
        self.activation = ACTIVATIONS[parameters.activation]
        self.channels = self.inner + 2 * self.query_heads * self.state_size
        self.in_proj = nn.Linear(config.model_dim, self.channels + self.inner + self.value_heads, bias=False)
        self.conv1d = DepthwiseConvolution(self.channels, parameters.kernel_size, bias=True)
        self.z_bias = nn.Parameter(torch.empty(self.inner))
        self.D = nn.Parameter(torch.empty(self.value_heads))
        self.out_proj = nn.Linear(self.inner, config.model_dim, bias=False)
        self.initialise(config.init_std)

    @torch.no_grad()
    def initialise(self, std: float) -> None:
        """The convolution passes on what it gets, and the gate is open, as the paper begins."""
        identity = torch.zeros_like(self.conv1d.weight)
        identity[..., -1] = 1
        init.copy_(self.conv1d.weight, identity)
        if self.conv1d.bias is not None:
            init.zeros_(self.conv1d.bias)
        init.constant_(self.z_bias, OPEN_GATE)
        init.ones_(self.D)

    def empty(self, batch: int, device: torch.device, dtype: torch.dtype) -> ScanMemory:
        state = (self.value_heads, self.inner // self.value_heads, self.state_size)
        return ScanMemory.empty(batch, self.conv1d.taps, self.channels, state, device, dtype)

    def _parts(
        self, u: Tensor, memory: ScanMemory | None, layout: Layout
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(x [B, L, Hv, e], log decays [B, L, Hv], B and C [B, L, Hq, N], z [B, L, E], the convolution's memory)."""
        mixed, z, raw = self.in_proj(u).split([self.channels, self.inner, self.value_heads], dim=-1)
        mixed, recent = self.conv1d(mixed, None if memory is None else memory.recent, layout)
        weights = self.query_heads * self.state_size
        x, b, c = self.activation(mixed).split([self.inner, weights, weights], dim=-1)
        b, c = (value.unflatten(-1, (self.query_heads, -1)) for value in (b, c))
        log_decay = F.logsigmoid(-raw.to(full_precision(raw.dtype)))
        return x.unflatten(-1, (self.value_heads, -1)), log_decay, b, c, z, recent

    def forward(self, u: Tensor, memory: ScanMemory | None, layout: Layout) -> tuple[Tensor, ScanMemory]:
        x, log_decay, b, c, z, recent = self._parts(u, memory, layout)
        state = None if memory is None else memory.state
        y, state = ops.selective_scan(x, log_decay, None, b, c, self.D, state, layout=layout)
        return self.out_proj(y.flatten(-2) * F.silu(z + self.z_bias)), ScanMemory(recent, state)

    def mixing_matrix(self, u: Tensor, layout: Layout | None = None) -> Tensor:
        """What MOHAWK's first stage fits to attention: T [B, H, L, L] with y = T x before the gate.

        `T[t, s] = (C_t . B_s) prod_{r = s+1..t} a_r` for s <= t in one document, and D on the diagonal.
        """
        layout = ops.layout_of(u.shape[0], u.shape[1], u.device) if layout is None else layout
        _, log_decay, b, c, _, _ = self._parts(u, None, layout)
        per_head = self.value_heads // self.query_heads
        b, c = (value.repeat_interleave(per_head, dim=2).transpose(1, 2) for value in (b, c))
        sums = log_decay.transpose(1, 2).cumsum(-1)
        below = torch.ones(u.shape[1], u.shape[1], dtype=torch.bool, device=u.device).tril()
        if not layout.plain:
            documents = document_numbers(layout)
            below = (below & (documents[:, :, None] == documents[:, None]))[:, None]
        decays = (sums[..., :, None] - sums[..., None, :]).masked_fill(~below, -torch.inf).exp()
        return (c @ b.mT) * decays + torch.diag_embed(self.D[:, None].expand(-1, u.shape[1]))

    @classmethod
    def reference(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Reference:
        """The authors' discrete Mamba-2 mixer, whose parameters have the same names."""
        queries = config["n_qk_heads"] if "n_qk_heads" in config else config["heads"]
        parameters = {
            "expand": config.get("expand", 1),
            "state_size": config["d_state"],
            "kernel_size": config["d_conv"],
            "query_heads": queries,
            "value_heads": config.get("n_v_heads", queries),
            "activation": config.get("activation", "identity"),
        }
        fields = {"model_dim": config["d_model"], "num_heads": 1}
        return Reference(fields, parameters, dict(tensors))
