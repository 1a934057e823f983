"""The gated delta rule: a state that decays and is corrected, not only added to (2412.06464)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from megalodon import ops
from megalodon.models.kin.config import KinConfig
from megalodon.models.kin.mixers.base import AtLeastOne, Memory, Mixer, MixerParameters, NotNegativeFloat, Reference
from megalodon.models.kin.mixers.sums import sums_of
from megalodon.ops.layout import Layout


@dataclass(frozen=True)
class DeltaMemory(Memory):
    """sums: [B, H, d, e]; recent: [B, K - 1, channels], the last inputs of the convolution."""

    PARTS: ClassVar[Mapping[str, frozenset[str]]] = MappingProxyType(
        {"state": frozenset({"sums"}), "convolution": frozenset({"recent"})}
    )

    sums: Tensor
    recent: Tensor


class GatedDelta(Mixer):
    """`S_t = a_t S_{t-1} + k_t (beta_t (v_t - (a_t S_{t-1})^T k_t))^T`, `o_t = d^(-1/2) S_t^T q_t`.

    q, k, v = silu(conv(Wx)), q and k of length 1; a = exp(-exp(A) softplus(W_a x + b)), beta = sigmoid(W_b x);
    out = Wo (rms_norm(o) * silu(Wz x)).
    """

    kind = "constant"

    class Parameters(MixerParameters):
        """key_heads: heads of q and k; None: num_heads, which values have. key_dim, value_dim: of a head; None: the
        config's head_dim. conv_size: taps K of the convolution. norm_eps: of the norm of each head."""

        key_heads: AtLeastOne | None = None
        key_dim: AtLeastOne | None = None
        value_dim: AtLeastOne | None = None
        conv_size: AtLeastOne = 4
        norm_eps: NotNegativeFloat = 1e-6

        def check(self, config: KinConfig) -> None:
            if self.key_heads is not None and config.num_heads % self.key_heads:
                raise ValueError(
                    f"gated_delta: num_heads={config.num_heads} is not divisible by key_heads={self.key_heads}"
                )

    def __init__(self, config: KinConfig, layer_index: int, parameters: Parameters) -> None:
        super().__init__(config, layer_index, parameters)
        dim, self.num_heads = config.model_dim, config.num_heads
        self.key_heads = parameters.key_heads or config.num_heads
        self.key_dim, self.value_dim = (
            parameters.key_dim or config.head_size,
            parameters.value_dim or config.head_size,
        )
        self.sizes = [self.key_heads * self.key_dim] * 2 + [self.num_heads * self.value_dim]
        self.qkv_proj = nn.Linear(dim, sum(self.sizes), bias=False)
        self.conv_weight = nn.Parameter(torch.empty(sum(self.sizes), parameters.conv_size))
        self.z_proj = nn.Linear(dim, self.sizes[2], bias=False)
        self.beta_proj = nn.Linear(dim, self.num_heads, bias=False)
        self.decay_proj = nn.Linear(dim, self.num_heads, bias=False)
        self.decay_bias = nn.Parameter(torch.ones(self.num_heads))
        self.decay_log = nn.Parameter(torch.zeros(self.num_heads))
        self.head_norm = nn.RMSNorm(self.value_dim, parameters.norm_eps)
        self.o_proj = nn.Linear(self.sizes[2], dim, bias=False)

    @torch.no_grad()
    def initialise(self, std: float) -> None:
        init.uniform_(
            self.conv_weight, -1 / math.sqrt(self.conv_weight.shape[1]), 1 / math.sqrt(self.conv_weight.shape[1])
        )
        init.ones_(self.decay_bias)
        init.copy_(self.decay_log, torch.empty_like(self.decay_log).uniform_(0.01, 16).log())

    @classmethod
    def multiply_adds(cls, config: KinConfig, parameters: Any, length: int) -> float:
        key, value = parameters.key_dim or config.head_size, parameters.value_dim or config.head_size
        return 3.0 * config.num_heads * key * value

    def empty(self, batch: int, device: torch.device, dtype: torch.dtype) -> DeltaMemory:
        sums = sums_of((batch, self.num_heads, self.key_dim, self.value_dim), device, dtype)
        shape = (batch, self.conv_weight.shape[1] - 1, sum(self.sizes))
        return DeltaMemory(sums, torch.zeros(shape, device=device, dtype=dtype))

    def _parts(
        self, x: Tensor, memory: DeltaMemory | None, layout: Layout
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Any], Tensor]:
        """(q and k [B, L, H, d], v [B, L, H, e], log decays and strengths, the convolution's memory)."""
        before = None if memory is None else memory.recent
        mixed, recent = ops.short_convolution(self.qkv_proj(x), self.conv_weight, None, before, layout, silu=True)
        q, k, v = mixed.split(self.sizes, dim=-1)
        q, k = (y.unflatten(-1, (self.key_heads, -1)) for y in (q, k))
        q, k = (y * torch.rsqrt((y * y).sum(-1, keepdim=True) + 1e-6) for y in (q, k))
        repeats = self.num_heads // self.key_heads
        q, k = (y.repeat_interleave(repeats, 2) if repeats > 1 else y for y in (q, k))
        wide = self.decay_proj(x).to(self.decay_log.dtype).float() if x.dtype != torch.float64 else self.decay_proj(x)
        decay = -self.decay_log.to(wide.dtype).exp() * F.softplus(wide + self.decay_bias.to(wide.dtype))
        rule = {"log_decay": decay, "beta": torch.sigmoid(self.beta_proj(x))}
        return q * self.key_dim**-0.5, k, v.unflatten(-1, (self.num_heads, -1)), rule, recent

    def mixing_matrix(self, x: Tensor, layout: Layout) -> Tensor:
        """[B, H, L, L]: how much each token reads of each, before the heads' norm."""
        q, k, _, rule, _ = self._parts(x, None, layout)
        each = torch.eye(x.shape[1], dtype=k.dtype, device=x.device)[None, :, None].expand(*k.shape[:3], -1)
        return ops.linear_attention(q, k, each, layout=layout, **rule)[0].transpose(1, 2)

    def forward(self, x: Tensor, memory: DeltaMemory | None, layout: Layout) -> tuple[Tensor, DeltaMemory]:
        q, k, v, rule, recent = self._parts(x, memory, layout)
        state = None if memory is None else ops.LinearState(memory.sums)
        out, state = ops.linear_attention(q, k, v, initial_state=state, layout=layout, **rule)
        gated = ops.silu_product(self.z_proj(x), self.head_norm(out).flatten(-2))
        return self.o_proj(gated), DeltaMemory(state.sums, recent)

    @classmethod
    def reference(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Reference:
        """Transformers' Qwen3-Next layer: heads' rows stand together there, group by group of a key head."""
        heads, groups = config["linear_num_value_heads"], config["linear_num_key_heads"]
        key, value, share = config["linear_key_head_dim"], config["linear_value_head_dim"], heads // groups
        fields = {"model_dim": config["hidden_size"], "num_heads": heads, "head_dim": value}
        parameters = {
            "key_heads": groups,
            "key_dim": key,
            "value_dim": value,
            "conv_size": config["linear_conv_kernel_dim"],
            "norm_eps": float(config["rms_norm_eps"]),
        }
        both = tensors["in_proj_qkvz.weight"].unflatten(0, (groups, -1)).split([key, key, *[share * value] * 2], dim=1)
        q, k, v, z = (part.flatten(0, 1) for part in both)
        b, a = (part.flatten(0, 1) for part in tensors["in_proj_ba.weight"].unflatten(0, (groups, -1)).chunk(2, dim=1))
        return Reference(
            fields,
            parameters,
            {
                "qkv_proj.weight": torch.cat([q, k, v]),
                "z_proj.weight": z,
                "beta_proj.weight": b,
                "decay_proj.weight": a,
                "conv_weight": tensors["conv1d.weight"][:, 0],
                "decay_bias": tensors["dt_bias"],
                "decay_log": tensors["A_log"],
                "head_norm.weight": tensors["norm.weight"],
                "o_proj.weight": tensors["out_proj.weight"],
            },
        )
