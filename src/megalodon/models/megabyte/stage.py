"""One stage of MEGABYTE: a causal Transformer whose layers see half of the channels of the token before."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from megalodon import ops
from megalodon.models.kin.mixers.base import Memory
from megalodon.models.kin.mixers.keys_and_values import KeysAndValues, attend
from megalodon.models.megabyte.config import MegabyteConfig
from megalodon.ops.layout import Layout
from megalodon.ops.recent import delayed, recent_after, with_recent


@dataclass(frozen=True)
class LayerMemory(Memory):
    """past: keys and values; before_attention, before_feed_forward: [B, 1, D / 2], what the two shifts bring next."""

    past: KeysAndValues
    before_attention: Tensor
    before_feed_forward: Tensor

    @staticmethod
    def empty(
        batch: int, width: int, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
    ) -> LayerMemory:
        """Of rows that have read nothing."""
        past = KeysAndValues.empty(batch, heads, head_dim, head_dim, device, dtype)
        shifts = (torch.zeros(batch, 1, width // 2, device=device, dtype=dtype) for _ in range(2))
        return LayerMemory(past, *shifts)


class UnitNorm(nn.Module):
    """`x / max(rms x, 1e-8) * g`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def initialize(self) -> None:
        """Ones."""
        init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32 if x.itemsize < 4 else x.dtype)
        return (x / (rms * x.shape[-1] ** -0.5).clamp(min=1e-8) * self.weight).to(x.dtype)


def shifted(x: Tensor, before: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """x with the second half of its channels from the token before (RWKV's shift), and what the next token gets."""
    kept, moved = x.chunk(2, dim=-1)
    joined = with_recent(before, moved, 1)
    return torch.cat([kept, delayed(joined, 1, 1, layout)], dim=-1), recent_after(joined, 1, layout)


class StageLayer(GradientCheckpointingLayer):
    """`x += attention(norm(shift x)); x += feed_forward(norm(shift x))`."""

    _can_checkpoint_with_cache = True  # the state is a value, not a store: computing it again changes nothing

    def __init__(self, config: MegabyteConfig, width: int) -> None:
        super().__init__()
        self.width, self.heads, self.head_dim = width, config.num_heads, config.head_dim
        self.rope_base, self.dropout = config.rope_base, config.dropout
        inner = self.heads * self.head_dim
        self.attention_norm, self.feed_forward_norm = UnitNorm(width), UnitNorm(width)
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.k_proj = nn.Linear(width, inner, bias=False)
        self.v_proj = nn.Linear(width, inner, bias=False)
        self.o_proj = nn.Linear(inner, width, bias=False)
        self.up_proj = nn.Linear(width, config.ffn_factor * width)
        self.down_proj = nn.Linear(config.ffn_factor * width, width)

    def forward(self, x: Tensor, memory: LayerMemory | None, layout: Layout) -> tuple[Tensor, LayerMemory]:
        """x [B, L, D] and the memory of what came before -> (out [B, L, D], the memory after it)."""
        if memory is None:
            memory = LayerMemory.empty(len(x), self.width, self.heads, self.head_dim, x.device, x.dtype)
        u, before_attention = shifted(x, memory.before_attention, layout)
        u = self.attention_norm(u)
        q, k, v = (project(u).unflatten(-1, (self.heads, -1)) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.rope_base is not None:
            turns = ops.rotations_of(layout, self.head_dim, self.rope_base)
            q, k = ops.rotate_halves(q, turns), ops.rotate_halves(k, turns)
        y, past = attend(q / math.sqrt(self.head_dim), k, v, memory.past, layout)
        x = x + F.dropout(self.o_proj(y.flatten(-2)), self.dropout, self.training)
        u, before_feed_forward = shifted(x, memory.before_feed_forward, layout)
        y = self.down_proj(F.gelu(self.up_proj(self.feed_forward_norm(u))))
        x = x + F.dropout(y, self.dropout, self.training)
        return x, LayerMemory(past, before_attention, before_feed_forward)


class PatchEmbedding(nn.Module):
    """What a coarser stage reads of the bytes of one element: `LN(Linear(LN(concatenation of their embeddings)))`."""

    def __init__(self, size: int, byte_width: int, width: int) -> None:
        super().__init__()
        self.inner_norm, self.outer_norm = nn.LayerNorm(size * byte_width), nn.LayerNorm(width)
        self.project = nn.Linear(size * byte_width, width)

    def initialize(self) -> None:
        """Norms that change nothing."""
        for norm in (self.inner_norm, self.outer_norm):
            init.ones_(norm.weight)
            init.zeros_(norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., size * byte_width] -> [..., width]."""
        return self.outer_norm(self.project(self.inner_norm(x)))


class StageFrame(nn.Module):
    """What a stage has beside its layers.

    Attributes:
        start: [D], what stands before its first element.
        positions: [n, D] learned ones, or None.
        embed: of its elements, None in the finest stage.
        project: to the next stage: one vector for each element there; None in the finest stage.
        final_norm: after its layers.
    """

    def __init__(self, config: MegabyteConfig, stage: int) -> None:
        super().__init__()
        width = config.widths[stage]
        inside = config.patches[stage:]  # of elements of finer stages in one of this
        self.start = nn.Parameter(torch.zeros(width))
        places = config.max_patches if stage == 0 else config.patches[stage - 1]
        self.positions = None
        if config.max_patches is not None and places is not None:
            self.positions = nn.Parameter(torch.zeros(places, width))
        self.embed = PatchEmbedding(math.prod(inside), config.model_dim, width) if inside else None
        self.project = nn.Linear(width, inside[0] * config.widths[stage + 1]) if inside else None
        self.final_norm = UnitNorm(width)

    def initialize(self) -> None:
        """The start as an embedding of N(0, 1), as the implementation that the vectors come from; positions too."""
        init.normal_(self.start)
        if self.positions is not None:
            init.normal_(self.positions)
