"""One Gecko block: long memory, gated attention over a window, feed-forward (GECKO: Block)."""

from __future__ import annotations

from megalodon.models.gecko.cema import GeckoCEMA
from megalodon.models.gecko.config import GeckoConfig
from megalodon.models.layers.feed_forward import FeedForward
from megalodon.models.layers.memory_block import MemoryBlock
from megalodon.models.layers.norms import RMSNorm
from megalodon.models.layers.timestep_decay_norm import TimestepDecayNorm
from megalodon.models.layers.window_attention import GatedWindowAttention


def norm_over_time(config: GeckoConfig) -> TimestepDecayNorm:
    """That of a block, or the one before the head."""
    return TimestepDecayNorm(
        config.model_dim, config.norm_num_groups, config.norm_beta1, config.norm_beta2, config.norm_eps
    )


class GeckoBlock(MemoryBlock):
    """Block number `layer` of a model."""

    def __init__(self, config: GeckoConfig, layer: int) -> None:
        dim, groups = config.model_dim, config.layernorm_num_groups
        super().__init__(
            norm_over_time(config),
            GeckoCEMA(dim, config.cema_ndim),
            RMSNorm(dim, config.norm_eps, config.norm_affine, groups),
            GatedWindowAttention(config),
            FeedForward(config, layer, groups),
            hidden_dropout=config.hidden_dropout,
            dropout=config.dropout,
            two_hop=config.two_hop_residual,
        )
