"""What mixers of normalised linear attention without decays share: one way, both ways, and over another sequence."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from megalodon import ops
from megalodon.models.implicit import Path, of_probe, probe
from megalodon.models.kin.mixers.base import Mixer
from megalodon.models.kin.mixers.sums import WeightedSums
from megalodon.ops.layout import Layout


class NormalisedLinear(Mixer):
    """`o_t = phi(q_t)^T sum phi(k) v^T / phi(q_t)^T sum phi(k)`. A subclass has the projections and says what phi is.

    Attributes:
        rope_base: None where queries and keys are not rotated.
        feature_map: phi, or one for queries and one for keys.
    """

    kind = "constant"
    two_way_mode = True
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    num_heads: int
    num_groups: int
    rope_base: float | None
    eps: float

    def maps(self) -> Any:
        """phi, as `ops.linear_attention` takes it."""
        raise NotImplementedError

    def forward(self, x: Tensor, memory: WeightedSums | None, layout: Layout) -> tuple[Tensor, WeightedSums | None]:
        q, k, v = self._heads(x, x)
        if self.rope_base is not None:
            turns = ops.rotations_of(layout, q.shape[-1], self.rope_base)
            q, k = ops.rotate_halves(q, turns), ops.rotate_halves(k, turns)
        options: dict[str, Any] = {"feature_map": self.maps(), "normalise": True, "eps": self.eps, "layout": layout}
        if self.two_way:
            return self.o_proj(ops.two_way_linear_attention(q, k, v, **options).flatten(-2)), None
        before = None if memory is None else memory.state()
        out, state = ops.linear_attention(q, k, v, initial_state=before, **options)
        return self.o_proj(out.flatten(-2)), WeightedSums.of(state)

    def paths(self, x: Tensor, layout: Layout) -> list[Path]:
        q, k, v = self._heads(x, x)
        if self.rope_base is not None:
            turns = ops.rotations_of(layout, q.shape[-1], self.rope_base)
            q, k = ops.rotate_halves(q, turns), ops.rotate_halves(k, turns)

        def mixed(values: Tensor) -> Tensor:
            options: dict[str, Any] = {"feature_map": self.maps(), "normalise": True, "eps": self.eps, "layout": layout}
            if self.two_way:
                return ops.two_way_linear_attention(q, k, values, **options)
            return ops.linear_attention(q, k, values, **options)[0]

        values = v.repeat_interleave(self.num_heads // self.num_groups, 2)
        terms = ((of_probe(mixed(probe(v))), None),)
        return [Path("attention", values, terms, mixed(v), self.o_proj.weight, bias=self.o_proj.bias)]

    def cross(self, x: Tensor, source: Tensor, padding: Tensor | None = None) -> Tensor:
        q, k, v = self._heads(x, source)
        out = ops.cross_linear_attention(
            q, k, v, feature_map=self.maps(), normalise=True, eps=self.eps, padding=padding
        )
        return self.o_proj(out.flatten(-2))

    def _heads(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (
            self.q_proj(x).unflatten(-1, (self.num_heads, -1)),
            self.k_proj(source).unflatten(-1, (self.num_groups, -1)),
            self.v_proj(source).unflatten(-1, (self.num_groups, -1)),
        )
