"""GLA: linear attention with a decay for each feature (2312.06635)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megalodon import ops
from megalodon.models.implicit import Path, of_probe, probe
from megalodon.models.kin.config import KinConfig
from megalodon.models.kin.mixers.base import AtLeastOne, Mixer, MixerParameters, NotNegativeFloat, Positive, Reference
from megalodon.models.kin.mixers.sums import Sums, sums_of
from megalodon.ops.layout import Layout
from megalodon.ops.linear_attention import FEATURE_MAPS


class GLA(Mixer):
    """`S_t = diag(a_t) S_{t-1} + k_t v_t^T`, `o_t = d^(-1/2) S_t^T q_t`, a = sigmoid(W2 W1 x + b)^(1/16);
    out = Wo (rms_norm(o) * silu(Wg x))."""

    kind = "constant"
    two_way_mode = True

    class Parameters(MixerParameters):
        """expand_k, expand_v: width of keys and values, all query heads together, in model widths. gate_rank: of the
        decay's projection. gate_normalizer: what its logarithm is divided by. least_log_decay: clamp it from below.
        feature_map: of queries and keys, by name. output_gate: whether to gate. norm_eps: of the norm of each head."""

        expand_k: float = 0.5
        expand_v: float = 1.0
        gate_rank: AtLeastOne = 16
        gate_normalizer: Positive = 16.0
        least_log_decay: float | None = None
        feature_map: str | None = None
        output_gate: bool = True
        norm_eps: NotNegativeFloat = 1e-5

        def check(self, config: KinConfig) -> None:
            for name in ("expand_k", "expand_v"):
                width = config.model_dim * getattr(self, name)
                if width < 1 or abs(width - round(width)) > 1e-6 or round(width) % config.num_heads:
                    raise ValueError(
                        f"gla: {name}={getattr(self, name)} makes a width of {width:g}, not divisible by "
                        f"num_heads={config.num_heads}"
                    )
            if self.least_log_decay is not None and self.least_log_decay > 0:
                raise ValueError(f"gla: least_log_decay={self.least_log_decay}: it must be at most 0")
            if self.feature_map is not None and self.feature_map not in FEATURE_MAPS:
                raise ValueError(f"gla: feature_map={self.feature_map!r}: choose from {', '.join(FEATURE_MAPS)}")

    def __init__(self, config: KinConfig, layer_index: int, parameters: Parameters) -> None:
        super().__init__(config, layer_index, parameters)
        dim, heads, groups = config.model_dim, config.num_heads, config.key_value_heads
        self.num_heads, self.num_groups, self.options = heads, groups, parameters
        self.key_dim, self.value_dim = (round(dim * x) // heads for x in (parameters.expand_k, parameters.expand_v))
        self.q_proj = nn.Linear(dim, heads * self.key_dim, bias=False)
        self.k_proj = nn.Linear(dim, groups * self.key_dim, bias=False)
        self.v_proj = nn.Linear(dim, groups * self.value_dim, bias=False)
        self.decay_down = nn.Linear(dim, parameters.gate_rank, bias=False)
        self.decay_up = nn.Linear(parameters.gate_rank, groups * self.key_dim)
        self.g_proj = nn.Linear(dim, heads * self.value_dim, bias=False) if parameters.output_gate else None
        self.head_norm = nn.RMSNorm(self.value_dim, parameters.norm_eps)
        self.o_proj = nn.Linear(heads * self.value_dim, dim, bias=False)

    @classmethod
    def multiply_adds(cls, config: KinConfig, parameters: Any, length: int) -> float:
        key, value = config.model_dim * parameters.expand_k, config.model_dim * parameters.expand_v
        return (1 + config.key_value_heads / config.num_heads) * key * value / config.num_heads

    def empty(self, batch: int, device: torch.device, dtype: torch.dtype) -> Sums:
        return Sums(sums_of((batch, self.num_groups, self.key_dim, self.value_dim), device, dtype))

    def forward(self, x: Tensor, memory: Sums | None, layout: Layout) -> tuple[Tensor, Sums | None]:
        out, after = self._mixed(x, self._values(x), memory, layout)
        return self.o_proj(self._gated(x, out)), after

    def _values(self, x: Tensor) -> Tensor:
        return self.v_proj(x).unflatten(-1, (self.num_groups, -1))

    def _keys(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(q [B, L, H, d], k [B, L, G, d], log decays [B, L, G, d])."""
        decay = F.logsigmoid(self.decay_up(self.decay_down(x)).float()) / self.options.gate_normalizer
        if self.options.least_log_decay is not None:
            decay = decay.clamp(min=self.options.least_log_decay)
        q = self.q_proj(x).unflatten(-1, (self.num_heads, -1))
        k = self.k_proj(x).unflatten(-1, (self.num_groups, -1))
        return q, k, decay.unflatten(-1, (self.num_groups, -1))

    def mixing_matrix(self, x: Tensor, layout: Layout) -> Tensor:
        """[B, H, L, L]: how much each token reads of each, before the heads' norm."""
        q, k, decay = self._keys(x)
        each = torch.eye(x.shape[1], dtype=k.dtype, device=x.device)[None, :, None].expand(*k.shape[:3], -1)
        options: dict[str, Any] = {"feature_map": self.options.feature_map, "layout": layout, "log_decay": decay}
        return ops.linear_attention(q, k, each, **options)[0].transpose(1, 2) * self.key_dim**-0.5

    def _mixed(self, x: Tensor, v: Tensor, memory: Sums | None, layout: Layout) -> tuple[Tensor, Sums | None]:
        """What the sums give for v [B, L, G, e], scaled: [B, L, H, e]; and the sums after it."""
        q, k, decay = self._keys(x)
        options: dict[str, Any] = {"feature_map": self.options.feature_map, "layout": layout, "log_decay": decay}
        if self.two_way:
            return ops.two_way_linear_attention(q, k, v, **options) * self.key_dim**-0.5, None
        before = None if memory is None else memory.state()
        out, state = ops.linear_attention(q, k, v, initial_state=before, **options)
        return out * self.key_dim**-0.5, Sums(state.sums)

    def _gated(self, x: Tensor, out: Tensor) -> Tensor:
        """out [B, L, H, e], normalised and gated: [B, L, H * e]."""
        normed = self.head_norm(out).flatten(-2)
        return normed if self.g_proj is None else ops.silu_product(self.g_proj(x), normed)

    def paths(self, x: Tensor, layout: Layout) -> list[Path]:
        v = self._values(x)
        out = self._mixed(x, v, None, layout)[0]
        matrix = of_probe(self._mixed(x, probe(v), None, layout)[0])
        gate = torch.rsqrt(out.square().mean(-1, keepdim=True) + self.options.norm_eps) * self.head_norm.weight
        if self.g_proj is not None:
            gate = gate * F.silu(self.g_proj(x)).unflatten(-1, (self.num_heads, -1))
        values = v.repeat_interleave(self.num_heads // self.num_groups, 2)
        outputs = self._gated(x, out).unflatten(-1, (self.num_heads, -1))
        return [Path("attention", values, ((matrix, gate),), outputs, self.o_proj.weight)]

    @classmethod
    def reference(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Reference:
        """Zoology's layer, and flash-linear-attention's, of which it is a copy."""
        if config.get("use_short_conv"):
            raise ValueError("gla: use_short_conv=True is not reproduced")
        fields = {"model_dim": config.get("d_model", config.get("hidden_size")), "num_heads": config["num_heads"]}
        fields["num_key_value_heads"] = config.get("num_kv_heads") or config["num_heads"]
        rank = tensors["gk_proj.0.weight"].shape[0]
        parameters = {
            "expand_k": float(config.get("expand_k", 0.5)),
            "expand_v": float(config.get("expand_v", 1.0)),
            "gate_rank": rank,
            "gate_normalizer": float(config.get("gate_logit_normalizer", 16)),
            "least_log_decay": config.get("clamp_min"),
            "feature_map": config.get("feature_map"),
            "output_gate": bool(config.get("use_output_gate", True)),
            "norm_eps": float(config.get("norm_eps", 1e-5)),
        }
        names = {"decay_down.weight": "gk_proj.0.weight", "decay_up.weight": "gk_proj.1.weight"}
        names |= {"decay_up.bias": "gk_proj.1.bias"}
        names |= {f"{name}_proj.weight": f"{name}_proj.weight" for name in "qkvo"}
        if parameters["output_gate"]:
            names["g_proj.weight"] = "g_proj.weight"
        fused = "g_norm_swish_gate.weight"
        names["head_norm.weight"] = fused if fused in tensors else "g_norm.weight"
        return Reference(fields, parameters, {ours: tensors[theirs] for ours, theirs in names.items()})
