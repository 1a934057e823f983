"""Retention as SUPRA has it: linear attention with a fixed decay for each head and a norm in place of a normaliser
(2405.06640; the decays of 2307.08621 or of ALiBi)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megalodon import ops
from megalodon.models.kin.config import KinConfig
from megalodon.models.kin.mixers.base import Memory, NotNegativeFloat, Reference
from megalodon.models.kin.mixers.projected import Projected, ProjectedParameters
from megalodon.models.kin.mixers.sums import Sums, sums_of
from megalodon.ops.layout import Layout


class Retention(Projected):
    """`o_t = sum_{j <= t} exp(-slope_h (t - j)) (rope(relu(E q_t)) . rope(relu(E k_j)) / sqrt(d)) v_j`, then each head
    normalised without weights, then Wo. E maps all heads of a token together."""

    kind = "constant"
    turns_heads = True

    class Parameters(ProjectedParameters):
        """decay: slopes as of ALiBi, of RetNet, or none. first_slope: of head 0, in place of ALiBi's. qk_norm: a layer
        norm of all heads of a token together, before the rotation. norm_eps: of the norm of each head."""

        decay: Literal["alibi", "retnet", "none"] = "alibi"
        first_slope: float | None = None
        qk_norm: bool = False
        norm_eps: NotNegativeFloat = 1e-5

        def check(self, config: KinConfig) -> None:
            if self.first_slope is not None and not 0 < self.first_slope < 1:
                raise ValueError(f"retention: first_slope={self.first_slope}: it must be between 0 and 1")

    def __init__(self, config: KinConfig, layer_index: int, parameters: Parameters) -> None:
        super().__init__(config, layer_index, parameters)
        width, self.norm_eps = self.num_heads * self.head_dim, parameters.norm_eps
        own, groups = self.num_groups != self.num_heads, self.num_groups * self.head_dim
        self.feature_q = nn.Linear(width, width)
        self.feature_k = nn.Linear(groups, groups) if own else None  # with equal heads queries and keys share one
        self.q_norm = nn.LayerNorm(width, bias=False) if parameters.qk_norm else None
        self.k_norm = nn.LayerNorm(width, bias=False) if parameters.qk_norm else None
        self.slopes = slopes(self.num_heads, parameters.decay, parameters.first_slope)

    @classmethod
    def multiply_adds(cls, config: KinConfig, parameters: Any, length: int) -> float:
        return 2.0 * config.num_heads * config.head_size**2

    def empty(self, batch: int, device: torch.device, dtype: torch.dtype) -> Sums:
        return Sums(sums_of((batch, self.num_heads, self.head_dim, self.head_dim), device, dtype))

    def head_outputs(self, x: Tensor, memory: Any, layout: Layout) -> tuple[Tensor, Memory | None]:
        groups = self.num_heads // self.num_groups
        q, k, v = self._heads(x, x)
        q = F.relu(self.feature_q(q.flatten(-2)))
        k = F.relu((self.feature_q if self.feature_k is None else self.feature_k)(k.flatten(-2)))
        k = k.unflatten(-1, (self.num_groups, -1)).repeat_interleave(groups, 2).flatten(-2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (y.unflatten(-1, (self.num_heads, -1)) for y in (q, k))
        if self.rotary is not None:
            q, k = self.rotary.turn(layout, q, k)
        v = v.repeat_interleave(groups, 2)
        decay = None
        if self.slopes is not None:
            decay = torch.tensor(self.slopes, device=x.device, dtype=torch.float64).neg()
        out, state = ops.linear_attention(
            q,
            k / math.sqrt(self.head_dim),
            v,
            log_decay=decay,
            initial_state=None if memory is None else memory.state(),
            layout=layout,
        )
        out = F.layer_norm(out, (self.head_dim,), eps=self.norm_eps)
        return out, Sums(state.sums)

    @classmethod
    def reference(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Reference:
        """SUPRA's `LinearAttn`: one input projection, `_totrain_*` for what conversion adds."""
        heads, groups, size = config["n_heads"], config["n_heads_kv"], config["head_dim"]
        fields = {
            "model_dim": config["dim"],
            "num_heads": heads,
            "num_key_value_heads": groups,
            "head_dim": size,
            "rope_base": float(config["rotary_base_frequency"]),
        }
        decay = "none" if not config["use_decay"] else "retnet" if config["use_retnet_slopes"] else "alibi"
        parameters = {
            "decay": decay,
            "first_slope": config["decay_start"],
            "qk_norm": config["qk_norm"],
            "norm_eps": float(config["groupnorm_eps"]),
        }
        q, k, v = tensors["in_proj.weight"].split([heads * size, groups * size, groups * size])
        ours = {"q_proj.weight": q, "k_proj.weight": k, "v_proj.weight": v, "o_proj.weight": tensors["out_proj.weight"]}
        for kind in ("weight", "bias"):
            ours[f"feature_q.{kind}"] = tensors[f"_totrain_embed.{kind}"]
            if groups != heads:
                ours[f"feature_k.{kind}"] = tensors[f"_totrain_embed_kv.{kind}"]
        if config["qk_norm"]:
            ours |= {f"{name}_norm.weight": tensors[f"_totrain_{name}_norm.weight"] for name in "qk"}
        return Reference(fields, parameters, ours)


def slopes(heads: int, decay: str, first: float | None = None) -> list[float] | None:
    """What each head's log decay falls by in a token: 2^(-8 (h + 1) / H) as of ALiBi (`first`^(h + 1) with another
    start), -ln(1 - 2^(-5 - h)) as of RetNet. Any number of heads."""
    match decay:
        case "none":
            return None
        case "retnet":
            return [-math.log1p(-(2.0 ** (-5 - head))) for head in range(heads)]
    ratio = 2.0 ** (-8.0 / heads)
    start = ratio if first is None else first
    return [start * ratio**head for head in range(heads)]
