"""Queries, keys and values as Llama makes them: what most mixers start from."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from megalodon.models.implicit import Path, of_probe
from megalodon.models.kin.config import KinConfig
from megalodon.models.kin.mixers.base import Mixer, MixerParameters
from megalodon.models.kin.mixers.rotary import Rotary
from megalodon.ops.layout import Layout


class ProjectedParameters(MixerParameters):
    """bias: of the projections of queries, keys and values; out_bias: of the output projection. head_norm: of each
    head's queries and keys before they turn, "rms" as Qwen3 has it or "layer" as Phi has it."""

    bias: bool = False
    out_bias: bool = False
    head_norm: Literal["rms", "layer"] | None = None


class Projected(Mixer):
    """`q_proj` to H heads, `k_proj` and `v_proj` to G, `o_proj` back."""

    class Parameters(ProjectedParameters):
        pass

    def __init__(self, config: KinConfig, layer_index: int, parameters: Any) -> None:
        super().__init__(config, layer_index, parameters)
        dim, self.head_dim, self.rotary = config.model_dim, config.head_size, Rotary.of(config)
        self.num_heads, self.num_groups = config.num_heads, config.key_value_heads
        bias = parameters.bias
        self.q_proj = nn.Linear(dim, self.num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(dim, self.num_groups * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, self.num_groups * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, dim, bias=parameters.out_bias)
        self.head_norms = None
        if parameters.head_norm is not None:
            norm = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}[parameters.head_norm]
            self.head_norms = nn.ModuleDict({name: norm(self.head_dim, eps=float(config.norm_eps)) for name in "qk"})

    def forward(self, x: Tensor, memory: Any, layout: Layout) -> tuple[Tensor, Any]:
        out, memory = self.head_outputs(x, memory, layout)
        return self.o_proj(out.flatten(-2)), memory

    def queries_keys_values(self, x: Tensor, layout: Layout, rotated: bool) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, L, D] -> q [B, L, H, d], k and v [B, L, G, d]; `rotated`: q and k by their places, on halves."""
        q, k, v = self._heads(x, x)
        if rotated and self.rotary is not None:
            q, k = self.rotary.turn(layout, q, k)
        return q, k, v

    def _heads(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of x, keys and values of source, before they turn."""
        q, k, v = (
            project(y).unflatten(-1, (-1, self.head_dim))
            for project, y in ((self.q_proj, x), (self.k_proj, source), (self.v_proj, source))
        )
        if self.head_norms is not None:
            q, k = self.head_norms["q"](q), self.head_norms["k"](k)
        return q, k, v

    def path(self, v: Tensor, out: Tensor, probed: Tensor) -> Path:
        """The one path of a mixer that is linear in v [B, L, G, d]: `out` [B, L, H, d] is what it makes of v, `probed`
        [B, L, H, L] of `probe(v)`."""
        values = v.repeat_interleave(self.num_heads // self.num_groups, 2)
        return Path("attention", values, ((of_probe(probed), None),), out, self.o_proj.weight, bias=self.o_proj.bias)
