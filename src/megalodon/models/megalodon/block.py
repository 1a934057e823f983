"""One Megalodon block: long memory, gated chunk attention, feed-forward, with a two-hop residual (SPEC: Block)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from megalodon.models.layers.cema import CEMA
from megalodon.models.layers.chunk_attention import GatedChunkAttention
from megalodon.models.layers.feed_forward import FeedForward
from megalodon.models.layers.norms import RMSNorm
from megalodon.models.layers.timestep_norm import TimestepNorm
from megalodon.models.megalodon.config import MegalodonConfig
from megalodon.models.state import LayerState
from megalodon.ops.layout import Layout


class MegalodonBlock(GradientCheckpointingLayer):
    """Block number `layer` of a model."""

    _can_checkpoint_with_cache = True  # the state is a value, not a store: computing it again changes nothing

    def __init__(self, config: MegalodonConfig, layer: int) -> None:
        super().__init__()
        dim = config.model_dim
        self.timestep_norm = TimestepNorm(dim, config.norm_num_groups, config.norm_prior_count, config.norm_eps)
        self.cema = CEMA(dim, config.cema_ndim)
        self.memory_norm = RMSNorm(dim, config.norm_eps, config.norm_affine)
        self.attention = GatedChunkAttention(config)
        self.feed_forward = FeedForward(config, layer)
        self.hidden_dropout, self.dropout = config.hidden_dropout, config.dropout

    def forward(
        self, x: Tensor, state: LayerState | None, turns: Tensor, layout: Layout, use_cache: bool
    ) -> tuple[Tensor, LayerState | None]:
        """x [B, L, D] and this layer's memory of what came before -> (out [B, L, D], the memory after it or None)."""
        n, moments = self.timestep_norm(x, None if state is None else state.moments, layout)
        m, h = self.cema(n, None if state is None else state.cema, layout)
        m = F.dropout(self.memory_norm(m), self.hidden_dropout, self.training)
        branch, open_chunk = self.attention(n, m, turns, None if state is None else state.chunk, layout, use_cache)
        y = x + F.dropout(branch, self.dropout, self.training)
        out = x + self.feed_forward(y)
        return out, None if open_chunk is None else LayerState(moments, h, open_chunk)
