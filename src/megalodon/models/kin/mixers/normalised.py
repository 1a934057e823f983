"""What mixers of normalised linear attention without decays share: one way, both ways, and over another sequence."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from megalodon import ops
from megalodon.models.implicit import Path, of_probe, probe
from megalodon.models.kin.mixers.base import Memory, Mixer
from megalodon.models.kin.mixers.rotary import Rotary
from megalodon.models.kin.mixers.sums import WeightedSums
from megalodon.ops.layout import Layout


class NormalisedLinear(Mixer):
    """`o_t = phi(q_t)^T sum phi(k) v^T / phi(q_t)^T sum phi(k)`. A subclass has the projections and says what phi is.

    Attributes:
        rotary: None where queries and keys are not rotated.
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
    rotary: Rotary | None
    eps: float

    def maps(self) -> Any:
        """phi, as `ops.linear_attention` takes it."""
        raise NotImplementedError

    def forward(self, x: Tensor, memory: Any, layout: Layout) -> tuple[Tensor, Any]:
        out, memory = self.head_outputs(x, memory, layout)
        return self.o_proj(out.flatten(-2)), memory

    def head_outputs(self, x: Tensor, memory: Any, layout: Layout) -> tuple[Tensor, Memory | None]:
        """`forward` before the output projection: (each head's output [B, L, H, d], the memory after it)."""
        q, k, v = self._heads(x, x)
        if self.rotary is not None:
            q, k = self.rotary.turn(layout, q, k)
        options: dict[str, Any] = {"feature_map": self.maps(), "normalise": True, "eps": self.eps, "layout": layout}
        if self.two_way:
            return ops.two_way_linear_attention(q, k, v, **options), None
        before = None if memory is None else memory.state()
        out, state = ops.linear_attention(q, k, v, initial_state=before, **options)
        return out, WeightedSums.of(state)

    def paths(self, x: Tensor, layout: Layout) -> list[Path]:
        q, k, v = self._heads(x, x)
        if self.rotary is not None:
            q, k = self.rotary.turn(layout, q, k)

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
