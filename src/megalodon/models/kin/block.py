"""One block of a kin model: x + mixer(norm x), then x + SwiGLU(norm x)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from megalodon import ops
from megalodon.models.implicit import Path
from megalodon.models.kin.config import KinConfig
from megalodon.models.kin.mixers import Memory, mixer_class
from megalodon.ops.layout import Layout


class SwiGLU(nn.Module):
    """`down(silu(gate x) * up x)`, without biases."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        return self.down_proj(ops.silu_product(self.gate_proj(x), self.up_proj(x)))


class KinBlock(GradientCheckpointingLayer):
    """Block number `layer` of a model; `feed_forward` is None where the config asks for none."""

    _can_checkpoint_with_cache = True  # the state is a value, not a store: computing it again changes nothing

    def __init__(self, config: KinConfig, layer: int) -> None:
        super().__init__()
        name, parameters = config.mixer_of(layer)
        kind = mixer_class(name)
        self.mixer_norm = None if kind.takes_residual else nn.RMSNorm(config.model_dim, config.norm_eps)
        self.mixer = kind(config, layer, parameters)
        hidden = config.ffn_hidden_dim
        self.feed_forward_norm = nn.RMSNorm(config.model_dim, config.norm_eps) if hidden else None
        self.feed_forward = SwiGLU(config.model_dim, hidden) if hidden else None
        self.dropout = config.dropout

    def forward(
        self, x: Tensor, memory: Memory | None, layout: Layout, use_cache: bool
    ) -> tuple[Tensor, Memory | None]:
        """x [B, L, D] and this layer's memory of what came before -> (out [B, L, D], the memory after it or None)."""
        y, memory = self.mixer(x if self.mixer_norm is None else self.mixer_norm(x), memory, layout)
        x = x + F.dropout(y, self.dropout, self.training)
        if self.feed_forward is not None and self.feed_forward_norm is not None:
            x = x + F.dropout(self.feed_forward(self.feed_forward_norm(x)), self.dropout, self.training)
        return x, memory if use_cache else None

    def paths(self, x: Tensor, layout: Layout) -> list[Path]:
        """The implicit attention of the mixer for the block's input x [B, L, D]."""
        return self.mixer.paths(x if self.mixer_norm is None else self.mixer_norm(x), layout)
