"""Queries, keys and values as Llama makes them: what most mixers start from."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from megalodon import ops
from megalodon.models.implicit import Path, of_probe
from megalodon.models.kin.config import KinConfig
from megalodon.models.kin.mixers.base import Mixer
from megalodon.ops.layout import Layout


class Projected(Mixer):
    """`q_proj` to H heads, `k_proj` and `v_proj` to G, `o_proj` back; `bias` of the first three, `out_bias` of it."""

    def __init__(
        self, config: KinConfig, layer_index: int, parameters: Any, bias: bool = False, out_bias: bool = False
    ) -> None:
        super().__init__(config, layer_index, parameters)
        dim, self.head_dim, self.rope_base = config.model_dim, config.head_size, config.rope_base
        self.num_heads, self.num_groups = config.num_heads, config.key_value_heads
        self.q_proj = nn.Linear(dim, self.num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(dim, self.num_groups * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, self.num_groups * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, dim, bias=out_bias)

    def queries_keys_values(self, x: Tensor, layout: Layout, rotated: bool) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, L, D] -> q [B, L, H, d], k and v [B, L, G, d]; `rotated`: q and k by their places, on halves."""
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj))
        if rotated and self.rope_base is not None:
            turns = ops.rotations_of(layout, self.head_dim, self.rope_base)
            q, k = ops.rotate_halves(q, turns), ops.rotate_halves(k, turns)
        return q, k, v

    def path(self, v: Tensor, out: Tensor, probed: Tensor) -> Path:
        """The one path of a mixer that is linear in v [B, L, G, d]: `out` [B, L, H, d] is what it makes of v, `probed`
        [B, L, H, L] of `probe(v)`."""
        values = v.repeat_interleave(self.num_heads // self.num_groups, 2)
        return Path("attention", values, ((of_probe(probed), None),), out, self.o_proj.weight, bias=self.o_proj.bias)
