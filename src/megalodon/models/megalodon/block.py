"""One Megalodon block: long memory, gated chunk attention, feed-forward, with a two-hop residual (SPEC: Block)."""

from __future__ import annotations

from megalodon.models.layers.cema import CEMA
from megalodon.models.layers.chunk_attention import GatedChunkAttention
from megalodon.models.layers.feed_forward import FeedForward
from megalodon.models.layers.memory_block import MemoryBlock
from megalodon.models.layers.norms import RMSNorm
from megalodon.models.layers.timestep_norm import TimestepNorm
from megalodon.models.megalodon.config import MegalodonConfig


class MegalodonBlock(MemoryBlock):
    """Block number `layer` of a model."""

    def __init__(self, config: MegalodonConfig, layer: int) -> None:
        dim = config.model_dim
        super().__init__(
            TimestepNorm(dim, config.norm_num_groups, config.norm_prior_count, config.norm_eps),
            CEMA(dim, config.cema_ndim),
            RMSNorm(dim, config.norm_eps, config.norm_affine),
            GatedChunkAttention(config),
            FeedForward(config, layer),
            hidden_dropout=config.hidden_dropout,
            dropout=config.dropout,
            two_hop=True,
        )
